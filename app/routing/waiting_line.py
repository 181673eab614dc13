"""Requests for which no replica has room, woken in the order in which they came.

Serve's router asks again for each of them after pauses that grow, so that a late one often goes
before an early one and room stays empty for up to a pause. One event loop; knows no replicas.
"""

import asyncio
import bisect
from dataclasses import dataclass, field


@dataclass(order=True)
class _Waiter:
    since: float
    turn: asyncio.Future[None] = field(compare=False)


class WaitingLine:
    """Whoever waits is woken when it is the first and there may be room, and after a time."""

    def __init__(self) -> None:
        self._waiters: list[_Waiter] = []

    def __len__(self) -> int:
        return len(self._waiters)

    async def wait(self, since: float, timeout_s: float) -> None:
        """Wait for a turn; `since` is when the request came, in anyone's clock."""
        waiter = _Waiter(since, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiters, waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter.turn
        except TimeoutError:
            pass
        finally:
            if not waiter.turn.done():
                waiter.turn.cancel()
            self._waiters = [other for other in self._waiters if other is not waiter]

    def wake(self, since: float = float("-inf")) -> None:
        """Give the first one its turn, of those that came after `since`."""
        for waiter in self._waiters:
            if waiter.since > since and not waiter.turn.done():
                waiter.turn.set_result(None)
                return
