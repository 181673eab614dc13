"""What the benchmark of the LoRA kernels measures is right, and wrong results are not reported."""

import pytest
import torch

from benchmarks import bench_lora_kernels as bench
from benchmarks.engine_workloads import SHAPES
from tests.kernels.cases import DEVICE


@pytest.fixture
def adapters(monkeypatch):
    monkeypatch.setattr(bench, "NUM_ADAPTERS", 4)
    return bench.make_adapters(SHAPES["tiny"], (8, 20), DEVICE, torch.float32)


def test_weights_that_must_move(adapters):
    # q and o have 128 outputs, k and v 64; every input is 128.
    elems = 2 * (128 + 128) + 2 * (128 + 64)
    assert adapters.ranks == [8, 20, 8, 20]
    assert adapters.layer_bytes([0, 0, 0]) == 8 * elems * 4
    assert adapters.layer_bytes([0, 1, 1, 3]) == (8 + 20 + 20) * elems * 4
    used = set(adapters.page_tables.flatten().tolist())
    assert used == set(range(adapters.pool.shape[0])), "every page is some adapter's"


@pytest.mark.parametrize("slots", [[2], [3, 1, 1, 0, 3], [0] * 17])
def test_calls_are_compared_with_the_twins(adapters, slots, monkeypatch):
    segments = bench.make_segments(adapters, slots)
    shrinks, expands = bench.layer_calls(adapters, segments, 1)
    assert len(shrinks) == len(expands) == 2
    for call in (*shrinks, *expands):
        call()
    bench.check(adapters, segments, 1)
    monkeypatch.setattr(bench.triton_ops, "lora_expand", lambda y, *rest: y.add_(1.0))
    with pytest.raises(AssertionError, match="differs from its twin"):
        bench.check(adapters, segments, 1)
