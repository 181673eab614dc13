"""When an engine counts as hung: after silence alone, and not while it said that it is busy."""

import asyncio
import time

import pytest

from slora_core.engine.watchdog import NUM_LOOKS, Watchdog
from tests.virtual_time import run_in_virtual_time

STALL_S = 8.0


class Engine:
    """Answers what it is asked until it hangs; notes when the watchdog gave it up."""

    def __init__(self) -> None:
        self.watchdog = Watchdog(STALL_S, self.ask, self.stall)
        self.hangs = False
        self.num_asked = 0
        self.stalls: list[tuple[float, str]] = []

    def ask(self) -> None:
        self.num_asked += 1
        if not self.hangs:
            asyncio.get_running_loop().call_later(0.1, self.watchdog.heard)

    def stall(self, reason: str) -> None:
        self.stalls.append((asyncio.get_running_loop().time(), reason))


def test_one_that_answers_is_asked_now_and_then() -> None:
    async def main() -> None:
        engine = Engine()
        await asyncio.sleep(100 * STALL_S)
        assert engine.stalls == []
        assert engine.num_asked == pytest.approx(100 * NUM_LOOKS, abs=2)
        engine.watchdog.stop()

    run_in_virtual_time(main())


def test_silence_is_told_once_and_in_time() -> None:
    async def main() -> None:
        engine = Engine()
        await asyncio.sleep(3.5 * STALL_S)
        engine.hangs = True
        await asyncio.sleep(10 * STALL_S)
        [(at_s, reason)] = engine.stalls
        assert STALL_S <= at_s - 3.5 * STALL_S <= STALL_S * (1 + 1 / NUM_LOOKS)
        assert reason == "the engine gave no sign of life for 8 s"

    run_in_virtual_time(main())


def test_what_was_announced_does_not_count() -> None:
    async def main() -> None:
        engine = Engine()
        engine.hangs = True
        engine.watchdog.announced(50.0, "it compiles")
        await asyncio.sleep(51.0)
        assert engine.stalls == []
        await asyncio.sleep(60.0)
        [(at_s, _)] = engine.stalls
        assert 50.0 + STALL_S * (1 - 1 / NUM_LOOKS) <= at_s <= 50.0 + STALL_S * (1 + 1 / NUM_LOOKS)

    run_in_virtual_time(main())


def test_what_was_announced_ends_with_the_next_message() -> None:
    async def main() -> None:
        engine = Engine()
        engine.hangs = True
        engine.watchdog.announced(1000.0, "it captures a graph")
        await asyncio.sleep(5.0)
        engine.watchdog.heard()
        await asyncio.sleep(2 * STALL_S)
        assert len(engine.stalls) == 1

    run_in_virtual_time(main())


def test_any_message_is_a_sign() -> None:
    async def main() -> None:
        engine = Engine()
        engine.hangs = True
        for _ in range(50):
            await asyncio.sleep(STALL_S * 0.7)
            engine.watchdog.heard()
        assert engine.stalls == []
        engine.watchdog.stop()
        await asyncio.sleep(10 * STALL_S)
        assert engine.stalls == []

    run_in_virtual_time(main())


def test_a_loop_that_was_held_up_itself_blames_nobody() -> None:
    async def main() -> None:
        told: list[str] = []
        watchdog = Watchdog(0.2, lambda: None, told.append)
        await asyncio.sleep(0.06)
        time.sleep(1.0)  # noqa: ASYNC251
        # What came in that time is read now.
        asyncio.get_running_loop().call_soon(watchdog.heard)
        await asyncio.sleep(0.06)
        watchdog.stop()
        assert told == []

    asyncio.run(main())
