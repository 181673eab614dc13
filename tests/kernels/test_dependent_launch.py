"""Kernels that start while the one before them ends keep the order of their stream."""

from collections.abc import Callable

import pytest
import torch

from kernels import triton_ops
from kernels.attention_plan import plan_decode
from tests.kernels.cases import DEVICE, make_lora_case, make_paged_case
from tests.kernels.elementwise import randn
from tests.on_gpu import gpu_test

DIMS = [(100, 70), (100, 70)]


def _lora() -> Callable[[], object]:
    """Only rows of the base model, and entries that are not used."""
    case = make_lora_case([(-1, 4)], [[8, 8]], DIMS, dtype=torch.bfloat16, block_rows=16).to(DEVICE)
    x = randn(4, 100, dtype=torch.bfloat16)
    y = randn(4, 140, dtype=torch.bfloat16)
    args = case.pool, 0, (0, 1)

    def run() -> None:
        v = triton_ops.lora_shrink(x, *args, case.segments)
        triton_ops.lora_expand(y, v, *args, (0, 70, 140), case.segments)

    return run


def _silu_mul() -> Callable[[], object]:
    """Only entries that are not used."""
    case = make_lora_case([], [[8, 8]], DIMS, dtype=torch.bfloat16, block_rows=16).to(DEVICE)
    gate_up = randn(4, 140, dtype=torch.bfloat16)
    v = torch.zeros(1, 2, 4, 16, device=DEVICE)
    return lambda: triton_ops.lora_silu_mul(gate_up, v, case.pool, 0, (0, 1), case.segments)


def _decode() -> Callable[[], object]:
    """Only rows that pad the batch."""
    case = make_paged_case([0, 0], head_dim=64, dtype=torch.bfloat16).to(DEVICE)
    q = randn(2, 4, 64, dtype=torch.bfloat16)
    plan = plan_decode([0, 0], 8).to(DEVICE)
    args = case.kv_cache, case.layer, case.block_tables, case.context_lens
    return lambda: triton_ops.paged_decode(q, *args, 0.125, plan)


@gpu_test
@pytest.mark.parametrize("make", [_lora, _silu_mul, _decode])
def test_kernels_without_work_let_nobody_overtake(make: Callable[[], Callable[[], object]]) -> None:
    """What follows them in a graph still waits for what they followed."""
    idle = make()
    factor = torch.randn(4096, 4096, device=DEVICE)
    expected = factor @ factor
    product, seen = torch.zeros_like(factor), torch.zeros_like(factor)

    def run() -> None:
        product.zero_()
        # Much longer than it takes to launch what follows.
        torch.mm(factor, factor, out=product)
        idle()
        seen.copy_(product)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        seen.zero_()
        graph.replay()
        assert torch.equal(seen, expected)
