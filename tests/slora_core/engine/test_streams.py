"""Tokens on their way to who reads them: gathered, in order, none lost, told once how it ended."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Self

import pytest

from slora_core.engine.streams import DeltaStream, DeltaStreams
from slora_core.errors import EngineDeadError, InvalidRequestError, SLoRAError
from slora_core.requests import Delta, FinishReason, StepOutput

LENGTH = FinishReason.LENGTH


class World:
    """Streams whose timer goes off when the test says so, just after it went off."""

    def __init__(self, interval_s: Callable[[int], float]) -> None:
        self.aborted: list[str] = []
        self.left: list[str] = []
        self.streams = DeltaStreams(interval_s, self.aborted.append, self.left.append)
        self.now = 100.0
        # Of timers that are set: when, and what they call.
        self.timers: list[tuple[float, Callable[[], object]]] = []
        loop = asyncio.get_running_loop()
        loop.time = lambda: self.now  # type: ignore[method-assign]
        loop.call_at = self._call_at  # type: ignore[method-assign]

    @classmethod
    async def make(cls, interval_s: Callable[[int], float] = lambda num_streams: 0.5) -> Self:
        world = cls(interval_s)
        with world.streams.open("earlier") as stream:
            world.step({"earlier": 1})
            await due(stream)
            world.step({"earlier": 2})
            await due(stream)
        world.aborted.clear()
        return world

    def _call_at(self, when: float, callback: Callable[[], object], *_: Any, **__: Any) -> Any:
        self.timers.append((when, callback))
        return object()

    def ring(self) -> None:
        [(self.now, callback)] = self.timers
        self.timers.clear()
        callback()

    def step(
        self,
        tokens: dict[str, int],
        cached_tokens: dict[str, int] | None = None,
        **endings: FinishReason | SLoRAError,
    ) -> None:
        """What a step gave: at most one token of each request."""
        output = StepOutput(list(tokens), list(tokens.values()), dict(endings), cached_tokens or {})
        self.streams.take(output)


async def due(stream: DeltaStream) -> list[Delta]:
    """What a reader gets that does not wait for more."""
    deltas: list[Delta] = []
    while True:
        reader = asyncio.create_task(stream.__anext__())
        for _ in range(3):
            await asyncio.sleep(0)
        if not reader.done():
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            return deltas
        try:
            deltas.append(reader.result())
        except StopAsyncIteration:
            return deltas


def on_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@on_loop
async def test_the_first_token_comes_at_once_and_the_others_on_the_timer() -> None:
    world = await World.make()
    with world.streams.open("r") as stream:
        assert await due(stream) == []
        world.step({"r": 5})
        assert world.timers == []
        assert await due(stream) == [Delta("r", [5])]
        world.step({"r": 6})
        world.step({"r": 7})
        assert await due(stream) == []
        assert [when for when, _ in world.timers] == [world.now + 0.5]
        world.ring()
        assert await due(stream) == [Delta("r", [6, 7])]
        # It is set by what comes, not for ever.
        assert world.timers == []
        world.step({"r": 8})
        assert await due(stream) == [] and len(world.timers) == 1


@on_loop
async def test_tokens_that_come_no_oftener_than_the_timer_do_not_wait() -> None:
    world = await World.make()
    with world.streams.open("r") as stream:
        for token in range(5):
            world.now += 0.5
            world.step({"r": token})
            assert await due(stream) == [Delta("r", [token])]
        world.now += 0.2
        world.step({"r": 5})
        assert await due(stream) == []
        # From the last time that any went out, not from when these came.
        assert [when for when, _ in world.timers] == pytest.approx([world.now + 0.3])


@on_loop
async def test_the_first_delta_tells_what_of_the_prompt_was_cached() -> None:
    world = await World.make()
    failed = EngineDeadError("dead")
    names = ("r", "at once", "failed")
    streams = [world.streams.open(name) for name in names]
    cached = {"r": 16, "at once": 32, "failed": 48, "unread": 64}
    endings = {"at once": LENGTH, "failed": failed}
    world.step(dict.fromkeys(names, 5), cached, **endings)
    first, at_once, with_error = [await due(stream) for stream in streams]
    assert first == [Delta("r", [5], num_cached_tokens=16)]
    assert at_once == [Delta("at once", [5], LENGTH, num_cached_tokens=32)]
    assert with_error == [
        Delta("failed", [5], num_cached_tokens=48),
        Delta("failed", [], error=failed),
    ]
    world.step({"r": 6}, r=LENGTH)
    assert await due(streams[0]) == [Delta("r", [6], LENGTH)]


@on_loop
async def test_one_timer_for_all_streams() -> None:
    world = await World.make()
    streams = [world.streams.open(name) for name in "abcd"]
    world.step({"a": 1, "b": 1, "c": 1})
    assert [await due(stream) for stream in streams[:3]] == [[Delta(n, [1])] for n in "abc"]
    world.step({"a": 2})
    # The first of "d" does not wait for the timer of the others.
    world.step({"b": 2, "d": 1})
    assert await due(streams[3]) == [Delta("d", [1])]
    world.step({"a": 3, "d": 2})
    assert [await due(stream) for stream in streams] == [[], [], [], []]
    world.ring()
    assert [await due(stream) for stream in streams] == [
        [Delta("a", [2, 3])],
        [Delta("b", [2])],
        [],
        [Delta("d", [2])],
    ]


@on_loop
async def test_the_interval_follows_the_number_of_streams() -> None:
    world = await World.make(lambda num_streams: num_streams / 10)
    asked = []
    streams = []
    for count, name in enumerate("abc", start=1):
        streams.append(world.streams.open(name))
        assert len(world.streams) == count
        world.step({name: 1})
        await due(streams[-1])
        world.step({name: 2})
        asked.append(world.timers[0][0] - world.now)
        world.ring()
    world.streams.take(StepOutput(endings={"a": LENGTH}))
    for stream in streams[:2]:
        await due(stream)
    streams[0].__exit__()
    world.step({"b": 3})
    asked.append(world.timers[0][0] - world.now)
    assert asked == pytest.approx([0.1, 0.2, 0.3, 0.2])


@on_loop
async def test_the_end_comes_at_once_with_the_tokens_before_it() -> None:
    world = await World.make()
    with world.streams.open("r") as stream:
        world.step({"r": 5})
        await due(stream)
        world.step({"r": 6})
        world.step({"r": 7}, r=LENGTH)
        assert not stream.has_ended
        assert await due(stream) == [Delta("r", [6, 7], LENGTH)]
        assert stream.has_ended
        # The timer finds nothing any more.
        world.ring()
        assert await due(stream) == []
    assert world.aborted == [] and len(world.streams) == 0


@pytest.mark.parametrize("num_tokens", [1, 2, 50])
@pytest.mark.parametrize("interval_s", [0.0, 0.001])
@pytest.mark.parametrize("pause_s", [0.0, 0.0005])
def test_nothing_is_lost_and_only_the_last_finishes(
    num_tokens: int, interval_s: float, pause_s: float
) -> None:
    async def main() -> list[Delta]:
        def ignore(request_id: str) -> None: ...

        streams = DeltaStreams(lambda num_streams: interval_s, ignore, ignore)

        async def feed() -> None:
            for token in range(num_tokens):
                await asyncio.sleep(pause_s)
                ending = {"r": LENGTH} if token == num_tokens - 1 else {}
                streams.take(StepOutput(["r"], [token], ending))

        with streams.open("r") as stream:
            feeder = asyncio.create_task(feed())
            deltas = [delta async for delta in stream]
        await feeder
        return deltas

    deltas = asyncio.run(main())
    assert [token for delta in deltas for token in delta.token_ids] == list(range(num_tokens))
    assert deltas[0].token_ids == [0]
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [LENGTH]
    assert all(delta.token_ids and delta.error is None for delta in deltas)


@on_loop
async def test_an_error_comes_after_the_tokens_before_it_and_is_not_raised() -> None:
    world = await World.make()
    error = InvalidRequestError("no", "prompt")
    with world.streams.open("r") as stream, world.streams.open("refused") as refused:
        world.step({"r": 5})
        await due(stream)
        world.step({"r": 6}, refused=error)
        assert await due(refused) == [Delta("refused", [], None, error)]
        assert await due(stream) == []
        world.step({}, r=error)
        assert await due(stream) == [Delta("r", [6]), Delta("r", [], None, error)]
    assert world.aborted == []


@on_loop
async def test_a_slow_reader_gets_everything_in_one_piece() -> None:
    world = await World.make()
    with world.streams.open("r") as slow, world.streams.open("fast") as fast:
        read = []
        for token in range(100):
            world.step({"r": token, "fast": token}, **({"r": LENGTH} if token == 99 else {}))
            if world.timers and token % 10 == 0:
                world.ring()
            read += await due(fast)
        assert [len(delta.token_ids) for delta in read] == [1] + [10] * 9
        assert await due(slow) == [Delta("r", list(range(100)), LENGTH)]


@on_loop
async def test_a_reader_that_waits_is_woken() -> None:
    world = await World.make()
    with world.streams.open("r") as stream:
        read: list[Delta] = []

        async def read_all() -> None:
            async for delta in stream:
                read.append(delta)

        reader = asyncio.create_task(read_all())
        for act, expected in (
            (lambda: world.step({"r": 1}), 1),
            (lambda: world.step({"r": 2}), 1),
            (world.ring, 2),
            (lambda: world.step({}, r=FinishReason.STOP), 3),
        ):
            act()
            for _ in range(5):
                await asyncio.sleep(0)
            assert len(read) == expected
        await reader
        assert read == [Delta("r", [1]), Delta("r", [2]), Delta("r", [], FinishReason.STOP)]


@on_loop
async def test_a_reader_that_was_cancelled_may_come_again() -> None:
    world = await World.make()
    with world.streams.open("r") as stream:
        assert await due(stream) == []
        world.step({"r": 1})
        world.step({"r": 2})
        assert await due(stream) == [Delta("r", [1, 2])]


async def _leave_by_break(stream: DeltaStream) -> None:
    with stream:
        async for _ in stream:
            break


async def _leave_by_error(stream: DeltaStream) -> None:
    with pytest.raises(ValueError), stream:
        await anext(stream)
        raise ValueError


async def _leave_by_cancelling(stream: DeltaStream) -> None:
    async def read() -> None:
        with stream:
            async for _ in stream:
                pass

    reader = asyncio.create_task(read())
    for _ in range(5):
        await asyncio.sleep(0)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)


@pytest.mark.parametrize("leave", [_leave_by_break, _leave_by_error, _leave_by_cancelling])
def test_closing_early_aborts(leave: Callable[[DeltaStream], Awaitable[None]]) -> None:
    async def main() -> None:
        world = await World.make()
        stream = world.streams.open("r")
        world.step({"r": 1})
        await leave(stream)
        assert world.aborted == ["r"] and len(world.streams) == 0
        # What comes still, of it or of ids that were never open, is nobody's.
        world.step({"r": 2, "unknown": 3}, r=FinishReason.ABORT)
        assert world.timers == [] and world.left == ["r"]
        # Its id is free.
        with world.streams.open("r") as again:
            world.step({"r": 4}, r=LENGTH)
            assert await due(again) == [Delta("r", [4], LENGTH)]
        assert world.aborted == world.left == ["r"]

    asyncio.run(main())


@on_loop
async def test_a_request_that_ended_before_its_abort_was_not_left() -> None:
    """Its end was on the way, or waited for the reader, when the stream was closed."""
    world = await World.make()
    for is_told_before in (False, True):
        with world.streams.open("r"):
            world.step({"r": 1})
            if is_told_before:
                world.step({"r": 2}, r=LENGTH)
        if not is_told_before:
            world.step({"r": 2}, r=LENGTH)
    assert world.aborted == ["r", "r"] and world.left == []


@on_loop
async def test_a_stream_closed_while_its_tokens_wait_for_the_timer() -> None:
    world = await World.make()
    with world.streams.open("other") as other:
        with world.streams.open("r") as stream:
            world.step({"r": 1, "other": 1})
            assert await due(stream) and await due(other)
            world.step({"r": 2, "other": 2})
        world.ring()
        assert await due(other) == [Delta("other", [2])]


@on_loop
async def test_an_abort_by_id_ends_a_stream_that_is_read_on() -> None:
    world = await World.make()
    with world.streams.open("r") as stream:
        world.step({"r": 1})
        world.step({}, r=FinishReason.ABORT)
        assert await due(stream) == [Delta("r", [1], FinishReason.ABORT)]
    assert world.aborted == world.left == []


@on_loop
async def test_an_error_ends_every_stream_after_its_tokens() -> None:
    world = await World.make()
    error = EngineDeadError("killed")
    streams = {name: world.streams.open(name) for name in ("new", "gathers", "done", "ended")}
    world.step({"gathers": 1, "done": 1, "ended": 1}, ended=LENGTH)
    for name in ("gathers", "done", "ended"):
        await due(streams[name])
    world.step({"gathers": 2})
    # Ended before, and not read yet: nothing failed for it.
    world.step({"done": 2}, done=LENGTH)
    for stream in world.streams:
        stream.end(error)
    told = {name: await due(stream) for name, stream in streams.items()}
    assert told == {
        "new": [Delta("new", [], None, error)],
        "gathers": [Delta("gathers", [2]), Delta("gathers", [], None, error)],
        "done": [Delta("done", [2], LENGTH)],
        "ended": [],
    }
    for stream in streams.values():
        stream.__exit__()
    assert world.aborted == []


@on_loop
async def test_no_two_streams_of_one_id() -> None:
    world = await World.make()
    with world.streams.open("r"), pytest.raises(AssertionError, match="r is running already"):
        world.streams.open("r")
