"""Steps of a rank that the start has no graphs of run without, then with them, to the bit.

What an engine does while it is idle is called by hand here; `test_main` has the loop that does.
"""

import pytest
import torch

from slora_core.engine.engine import Engine
from tests.gpu.cases import SMALL_KINDS, check, make_entries
from tests.on_gpu import needs_gpu
from tests.oracle import GreedyOracle
from tests.slora_core.engine.planned_steps import plan_step

pytestmark = needs_gpu

LARGE = ("rank100-all",)


def _capture_late_graphs(engine: Engine) -> int:
    """As the loop does; how many."""
    num = 0
    while engine.has_late_graphs:
        engine.capture_late_graph()
        num += 1
    return num


def _must_not_run(*_: object) -> torch.Tensor:
    raise AssertionError("a step was launched kernel by kernel")


def test_a_rank_without_graphs_is_captured_when_the_engine_is_idle(
    make_engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = make_entries(4, seed=9, kinds=LARGE)
    # With a prefix cache the second time would take other, smaller steps.
    engine = make_engine(prefix_caching=False)
    graphs = engine.runner._graphs
    at_start = len(graphs)
    assert {s.lora.max_rank for s in graphs._graphs if s.lora is not None} == {16, 32, 64}
    texts = engine.generate(entries)
    assert texts == make_engine(cuda_graphs=False).generate(entries)
    assert len(graphs) == at_start, "no step waits for a capture"
    num_captured = _capture_late_graphs(engine)
    assert num_captured > 0 and len(graphs) == at_start + num_captured
    # All that the same requests need is there now.
    monkeypatch.setattr(engine.runner, "_forward", _must_not_run)
    assert engine.generate(entries) == texts
    assert not engine.has_late_graphs


def test_a_step_has_the_same_bits_with_its_graph_and_without(make_engine) -> None:
    engine = make_engine(max_batched_tokens=64)
    runner, builder = engine.runner, engine.builder
    for entry in make_entries(6, seed=10, kinds=(*LARGE, None)):
        engine.add_request(entry)
    num_compared = 0
    while engine.has_work:
        plan = plan_step(engine)
        inputs = builder.build(plan.chunks)
        shape = inputs.shape
        is_new = shape.is_padded and shape not in runner._graphs
        logits = runner.logits(inputs).clone()
        if is_new:
            # Writes no KV and no block table.
            runner.capture(builder.build_as([], shape))
            assert torch.equal(runner.logits(inputs), logits)
            num_compared += 1
        engine.scheduler.commit(plan, logits.argmax(-1).tolist())
    assert num_compared >= 3


def test_a_capture_without_memory_leaves_everything_as_it_was(
    make_engine, oracle: GreedyOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_inflight_steps=2)
    entries = make_entries(6, seed=11, kinds=LARGE)
    check(oracle, engine, entries)
    num_graphs = engine.runner.num_graphs()
    forward = engine.runner._forward

    def forward_until_no_memory(*args: object, **kwargs: object) -> torch.Tensor:
        logits = forward(*args, **kwargs)
        if torch.cuda.is_current_stream_capturing():
            # A pebibyte.
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return logits

    stream = torch.cuda.current_stream()
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "_forward", forward_until_no_memory)
        engine.capture_late_graph()
    assert engine.runner.num_graphs() == num_graphs and not engine.has_late_graphs
    assert torch.cuda.current_stream() == stream
    # Steps with graphs and without, in two more rounds.
    check(oracle, engine, entries)
    check(oracle, engine, make_entries(20, seed=12))
    check(oracle, engine, make_entries(10, seed=13, kinds=SMALL_KINDS))
