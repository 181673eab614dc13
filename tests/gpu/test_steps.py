"""Steps on a GPU: the host waits for none, and adapters beside it change no bit of a base row."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from slora_core.engine.engine import Engine
from slora_core.requests import Request, SamplingParams, ScheduledChunk
from tests.gpu.cases import SMALL_KINDS, make_entries
from tests.on_gpu import needs_gpu
from tests.slora_core.engine.planned_steps import plan_step

pytestmark = needs_gpu


def _add(engine: Engine, entries: list[Request]) -> None:
    for entry in entries:
        engine.add_request(entry)


@contextmanager
def _waits_are_errors() -> Iterator[None]:
    """Raise where torch would wait for the device; an event's own `synchronize` is let through."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_steady_decoding_waits_for_nothing(
    make_engine, cuda_graphs: bool, temperature: float
) -> None:
    engine = make_engine(cuda_graphs=cuda_graphs, max_inflight_steps=2)
    _add(
        engine,
        make_entries(
            12, seed=7, kinds=SMALL_KINDS, max_tokens=80, temperature=temperature, top_k=40
        ),
    )
    for _ in range(15):
        engine.step()
    before = torch.cuda.memory_stats()["num_device_alloc"]
    with _waits_are_errors():
        for _ in range(50):
            engine.step()
    assert engine.stats().num_running == 12
    # Nor does the driver, which waits where memory is taken from it.
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


def test_a_step_that_samples_nothing_is_waited_for(make_engine) -> None:
    """What such a step reads and writes is nobody else's before the device is through with it."""
    engine = make_engine(max_batched_tokens=64)
    engine.add_request(Request(list(range(3, 203)), SamplingParams(max_tokens=1)))
    plan = engine.scheduler.schedule()
    inputs = engine.builder.build(plan.chunks)
    assert [(chunk.end, chunk.samples) for chunk in plan.chunks] == [(64, False)]
    stream = torch.cuda.current_stream()
    # Clock cycles: a tenth of a second and more.
    torch.cuda._sleep(200_000_000)
    handle = engine.runner.run(inputs)
    assert not stream.query(), "the device is busy with the step"
    assert handle.token_ids() == []
    assert stream.query()


def test_prompts_and_cold_adapters_join_without_a_wait(make_engine) -> None:
    engine = make_engine(max_inflight_steps=2)
    _add(engine, make_entries(4, kinds=(None,), max_tokens=80))
    for _ in range(10):
        engine.step()
    with _waits_are_errors():
        _add(engine, make_entries(6, seed=1, kinds=SMALL_KINDS[1:]))
        for _ in range(40):
            engine.step()
    stats = engine.stats()
    assert (stats.num_adapter_loads, stats.num_finished, stats.num_running) == (3, 6, 4)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_rows_have_the_same_bits_with_adapters_taken_off(
    make_engine, dtype: str, cuda_graphs: bool
) -> None:
    engine = make_engine(dtype=dtype, cuda_graphs=cuda_graphs)
    _add(engine, make_entries(12, seed=6, kinds=SMALL_KINDS))
    compared = {True: 0, False: 0}
    for _ in range(14):
        plan = plan_step(engine)
        mixed, replayed = _logits(engine, plan.chunks)
        without = [chunk._replace(slot=-1) for chunk in plan.chunks]
        stripped, stripped_replayed = _logits(engine, without)
        # Rewrite the KV that the stripped step wrote, and get the same bits as before.
        assert torch.equal(_logits(engine, plan.chunks)[0], mixed)

        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        # A graph may have room for one of the two steps alone; their kernels differ then.
        if replayed == stripped_replayed and any(chunk.slot >= 0 for chunk in plan.chunks):
            for row, chunk in enumerate(sampling):
                is_base = chunk.slot < 0
                compared[is_base] += 1
                assert torch.equal(mixed[row], stripped[row]) is is_base
        engine.scheduler.commit(plan, mixed.argmax(-1).tolist())
    assert compared[True] >= 30 and compared[False] >= 90


def _logits(engine: Engine, chunks: Sequence[ScheduledChunk]) -> tuple[torch.Tensor, bool]:
    """fp32 [chunks that sample, vocab_size] of a step, and whether a graph made them."""
    inputs = engine.builder.build(chunks)
    # A graph's are overwritten by its next replay.
    return engine.runner.logits(inputs).clone(), inputs.shape.is_padded
