"""Runs a coroutine on a clock that jumps to the next timer, so that tests can say exact times.

Only what sleeps on the event loop is sped up: the loop's clock is the only one that jumps.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _SkippingSelector(selectors.DefaultSelector):
    """Instead of waiting for a timer, moves the clock on to it."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            return super().select(None)
        self.now_s += max(0.0, timeout)
        return super().select(0)


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _SkippingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


def run_in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`; its `loop.time()` starts at 0 and knows nothing of other clocks."""
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        return runner.run(main)
