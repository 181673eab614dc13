"""A step that fails on a GPU costs nobody an answer but those that it is to be blamed on."""

import pytest
import torch

from slora_core.adapters.page_layout import PackedAdapter
from slora_core.execution import model_runner
from slora_core.execution.sampler import SamplingBatch, sample
from tests.gpu.cases import check, make_entries
from tests.on_gpu import needs_gpu
from tests.oracle import GreedyOracle

pytestmark = needs_gpu


def _run_out_of_memory() -> None:
    """Ask for a pebibyte."""
    torch.empty(1 << 50, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("at_call", [2, 6, 15])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_step_without_memory_is_tried_again(
    make_engine,
    oracle: GreedyOracle,
    monkeypatch: pytest.MonkeyPatch,
    cuda_graphs: bool,
    at_call: int,
) -> None:
    """In the sampler: all that the step writes of KV is on its way by then."""
    engine = make_engine(cuda_graphs=cuda_graphs, max_inflight_steps=2)
    num_calls = 0

    def sample_until_no_memory(
        logits: torch.Tensor, sampling: SamplingBatch | None
    ) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == at_call:
            _run_out_of_memory()
        return sample(logits, sampling)

    monkeypatch.setattr(model_runner, "sample", sample_until_no_memory)
    check(oracle, engine, make_entries(20, seed=14))
    assert num_calls > at_call and engine.stats().num_refused == 0


def test_an_adapter_that_cannot_be_copied_is_told_and_leaves_the_rest(
    make_engine, oracle: GreedyOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_inflight_steps=2)
    load = engine.runner.tables.load

    def load_but_one(slot: int, adapter: PackedAdapter, page_ids: list[int]) -> None:
        load(slot, adapter, page_ids)
        if adapter.adapter_id == "rank16-all":
            # After the copy was started, which must not meet the pages' next owner.
            _run_out_of_memory()

    bad = make_entries(3, seed=15, kinds=("rank16-all",))
    good = make_entries(12, seed=16, kinds=(None, "rank4-qv", "rank33-attention"))
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.tables, "load", load_but_one)
        states = [engine.add_request(request) for request in bad]
        check(oracle, engine, good)
    assert engine.stats().num_refused == len(bad)
    assert not any(state.output_ids for state in states)
    check(oracle, engine, bad)
