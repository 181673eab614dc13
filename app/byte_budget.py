"""How many bytes may be in work at once, handed out in the order of asking."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


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


class ThreadByteBudget:
    """As `ByteBudget`, for threads, which wait for their turn."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes_in_work = 0
        # Held by who is next in the row: small pieces must not pass a large one for ever.
        self._turn = threading.Lock()
        self._given_back = threading.Condition()

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[None]:
        with self._turn, self._given_back:
            self._given_back.wait_for(lambda: self._has_room(nbytes))
            self._bytes_in_work += nbytes
        try:
            yield
        finally:
            with self._given_back:
                self._bytes_in_work -= nbytes
                self._given_back.notify()

    def _has_room(self, nbytes: int) -> bool:
        return not self._bytes_in_work or self._bytes_in_work + nbytes <= self._max_bytes
