"""Calls that wait for a change, woken together.

Each answer costs Serve's Python some milliseconds in two processes, so in a burst of changes
followers are given what of it has come together. It knows no registrations.
"""

import asyncio
import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

# Seconds between two wakings. One change alone is told of at once; of a burst a follower hears ten
# times a second, at 3% of a core instead of a whole one. Who asked for a change does not wait.
WAKE_EVERY_S = 0.1


class LongPoll:
    """To be used on one event loop."""

    def __init__(self) -> None:
        self._woken = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._woke_at = float("-inf")

    def announce(self) -> None:
        """Something may have changed."""
        if self._timer is None:
            loop = asyncio.get_running_loop()
            wake_at = max(loop.time(), self._woke_at + WAKE_EVERY_S)
            self._timer = loop.call_at(wake_at, self._wake)

    async def wait(self, has_news: Callable[[], bool], timeout_s: float) -> None:
        """Return when there is news, together with others where more is under way, or in time."""
        try:
            async with asyncio.timeout(timeout_s):
                if self._timer is not None:
                    await self._woken.wait()
                while not has_news():
                    await self._woken.wait()
        except TimeoutError:
            logger.debug("no change in %s s", timeout_s)

    def _wake(self) -> None:
        self._timer = None
        self._woke_at = asyncio.get_running_loop().time()
        self._woken.set()
        self._woken = asyncio.Event()
