"""How many bytes may be in work at once, handed out in the order of asking."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ByteBudget:
    """At most `max_bytes` in work, or one piece of any size; use on one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes_in_work = 0
        # Held by who is next in the row.
        self._turn = asyncio.Lock()
        self._given_back = asyncio.Event()

    @asynccontextmanager
    async def taken(self, nbytes: int) -> AsyncIterator[None]:
        async with self._turn:
            while self._bytes_in_work and self._bytes_in_work + nbytes > self._max_bytes:
                self._given_back.clear()
                await self._given_back.wait()
            self._bytes_in_work += nbytes
        try:
            yield
        finally:
            self._bytes_in_work -= nbytes
            self._given_back.set()
