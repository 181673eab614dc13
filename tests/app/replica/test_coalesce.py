import asyncio
import time

import pytest

from app.replica.coalesce import coalesce
from slora_core.errors import EngineDeadError
from slora_core.requests import FinishReason, RequestOutput


async def outputs(num_tokens, step_s, error=None, closed=None):
    try:
        for token in range(num_tokens):
            await asyncio.sleep(step_s)
            last = token == num_tokens - 1 and error is None
            yield RequestOutput("r", [token], FinishReason.LENGTH if last else None)
        if error is not None:
            raise error
    finally:
        if closed is not None:
            closed.set()


def collect(num_tokens, step_s, interval_s):
    async def run():
        chunks, times = [], []
        async for chunk in coalesce(outputs(num_tokens, step_s), lambda: interval_s):
            chunks.append(chunk)
            times.append(time.monotonic())
        return chunks, times

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("num_tokens", "step_s", "interval_s"), [(1, 0, 1), (50, 0, 0.01), (20, 0.002, 0.01), (3, 0, 0)]
)
def test_nothing_is_lost_and_only_the_last_finishes(num_tokens, step_s, interval_s):
    chunks, _ = collect(num_tokens, step_s, interval_s)
    assert [t for ids, _ in chunks for t in ids] == list(range(num_tokens))
    reasons = [reason for _, reason in chunks]
    assert reasons[-1] is FinishReason.LENGTH
    assert set(reasons[:-1]) <= {None}


def test_the_first_comes_alone_and_the_rest_on_the_timer():
    chunks, times = collect(40, 0.005, 0.05)
    assert chunks[0][0] == [0]
    assert len(chunks) < 10
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert all(gap >= 0.045 for gap in gaps[:-1])


def test_the_timer_follows_the_load():
    async def run():
        waits = iter([0.02, 0.1, 0.02, *[0.1] * 9])
        times = [time.monotonic()]
        async for _ in coalesce(outputs(100, 0.004), lambda: next(waits)):
            times.append(time.monotonic())
        return [b - a for a, b in zip(times[1:], times[2:], strict=False)]

    gaps = asyncio.run(run())
    assert gaps[0] < 0.1 <= gaps[1] + 0.005 and gaps[2] < 0.1 <= gaps[3] + 0.005


def test_the_end_does_not_wait_for_the_timer():
    start = time.monotonic()
    collect(3, 0, 5.0)
    assert time.monotonic() - start < 1.0


def test_an_error_comes_after_the_tokens_before_it():
    async def run():
        seen = []
        with pytest.raises(EngineDeadError):
            async for ids, _ in coalesce(outputs(5, 0, EngineDeadError("dead")), lambda: 0.01):
                seen.extend(ids)
        return seen

    assert asyncio.run(run()) == list(range(5))


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_closes_the_source(how):
    async def run():
        closed = asyncio.Event()
        chunks = coalesce(outputs(1000, 0.001, closed=closed), lambda: 0.01)

        async def read():
            async for _ in chunks:
                if how == "close":
                    break
            await chunks.aclose()

        reader = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        if how == "cancel":
            reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        return closed.is_set()

    assert asyncio.run(run())
