"""Calls that wait for a change, woken together.

Each answer costs Serve's Python some milliseconds in two processes, so in a burst of changes
followers are given what of it has come together. It knows no registrations.
"""

import asyncio
import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

# Seconds from a change to the answers that tell of it: nobody who asked for the change waits for
# that, and 5,000 changes in a minute are at most 50 answers a second to each follower.
WAKE_AFTER_S = 0.02


class LongPoll:
    """To be used on one event loop."""

    def __init__(self) -> None:
        self._woken = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def announce(self) -> None:
        """Something may have changed."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WAKE_AFTER_S, self._wake)

    async def wait(self, has_news: Callable[[], bool], timeout_s: float) -> None:
        """Return when there is news and more of it that is under way has come, or in time."""
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
        self._woken.set()
        self._woken = asyncio.Event()
