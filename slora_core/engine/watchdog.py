"""Whether an engine process gives signs of life: a step that never ends gives none.

Owns how long silence may last. Any message is a sign, and the engine is asked for one all the
while, which it gives between two steps. It ends nothing: `engine.process` does.
"""

import asyncio
import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

# Looks within the time that silence may last. Looks are counted and not seconds: where this process
# itself was held up, what came meanwhile is read before the next look.
NUM_LOOKS = 4


class Watchdog:
    """Calls `on_stall` once, with the reason, where nothing is heard for `stall_s`.

    Make it on a running event loop.

    Args:
        ask: has the engine send a message as soon as it can.
    """

    def __init__(
        self, stall_s: float, ask: Callable[[], None], on_stall: Callable[[str], None]
    ) -> None:
        self._stall_s = stall_s
        self._ask = ask
        self._on_stall = on_stall
        self._loop = asyncio.get_running_loop()
        # Until when silence is no surprise.
        self._quiet_until = 0.0
        self._num_silent_looks = 0
        self._watching = asyncio.create_task(self._watch())

    def heard(self) -> None:
        """The engine sent something, which also ends what it had announced."""
        self._num_silent_looks = 0
        self._quiet_until = 0.0

    def announced(self, seconds: float, reason: str) -> None:
        """The engine said that it may be silent for so long, or until it is heard again."""
        logger.info("the engine is busy, for up to %.0f s: %s", seconds, reason)
        self._quiet_until = self._loop.time() + seconds

    def stop(self) -> None:
        self._watching.cancel()

    async def _watch(self) -> None:
        # The first of them ends a time in which something may have been heard.
        while self._num_silent_looks <= NUM_LOOKS:
            self._ask()
            await asyncio.sleep(self._stall_s / NUM_LOOKS)
            self._num_silent_looks += 1
            if self._loop.time() < self._quiet_until:
                self._num_silent_looks = 0
        self._on_stall(f"the engine gave no sign of life for {self._stall_s:g} s")
