"""SiLU-mul, the twin's and the kernel's, against fp64 math."""

from types import ModuleType

import pytest
import torch

from kernels import torch_ops, triton_ops
from tests.kernels import naive
from tests.kernels.cases import DEVICE, assert_close
from tests.kernels.elementwise import (
    EVERY_16_BIT_DTYPE,
    EVERY_DTYPE,
    EVERY_OPS,
    assert_few_bits_differ,
    assert_replay_equals_eager,
    randn,
)
from tests.on_gpu import gpu_test

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _check(ops: ModuleType, gate_up: torch.Tensor) -> None:
    before = gate_up.clone()
    y = ops.silu_mul(gate_up)
    assert y.dtype == gate_up.dtype
    # Outputs reach ten, where one unit in the last place of fp16 is already 8e-3.
    assert_close(y / 8, naive.silu_mul(gate_up) / 8, gate_up.dtype)
    assert torch.equal(gate_up, before)


@EVERY_OPS
@EVERY_DTYPE
@pytest.mark.parametrize(
    "rows,features", [(1, 1), (3, 7), (5, 96), (0, 4), (2, 1024), (3, 1030), (2, 5000)]
)
def test_silu_mul(ops: ModuleType, rows: int, features: int, dtype: torch.dtype) -> None:
    _check(ops, 3 * randn(rows, 2 * features, dtype=dtype))


@EVERY_DTYPE
def test_larger_blocks_of_many_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.silu_mul.MANY_ELEMS", 0)
    _check(triton_ops, 3 * randn(3, 2 * 4100, dtype=dtype))


@EVERY_OPS
def test_wider_rows(ops: ModuleType) -> None:
    _check(ops, randn(4, 100)[:, 30:94])


# The interpreter's exp is numpy's, which warns.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@EVERY_OPS
@EVERY_DTYPE
def test_gates_far_from_zero(ops: ModuleType, dtype: torch.dtype) -> None:
    gate = torch.tensor([[-3e4, -200.0, 0.0, 200.0, 3e4]], device=DEVICE)
    up = torch.full_like(gate, 0.5)
    y = ops.silu_mul(torch.cat((gate, up), dim=1).to(dtype))
    expected = torch.tensor([[0.0, 0.0, 0.0, 100.0, 1.5e4]], dtype=torch.float64)
    assert_close(y, expected, dtype)


@EVERY_16_BIT_DTYPE
def test_kernel_rounds_where_the_twin_does(dtype: torch.dtype) -> None:
    gate_up = randn(20, 1000, dtype=dtype)
    assert_few_bits_differ(triton_ops.silu_mul(gate_up), torch_ops.silu_mul(gate_up))


@gpu_test
@pytest.mark.parametrize("rows", [1, 64, 1024])
def test_graph_replay_equals_eager(rows: int) -> None:
    batches = [(randn(rows, 2 * 11008, dtype=torch.bfloat16, seed=seed),) for seed in (1, 2)]
    assert_replay_equals_eager(triton_ops.silu_mul, batches)


@gpu_test
def test_more_elements_than_an_int32_counts() -> None:
    gate_up = torch.ones(2**31 // 8192 + 3, 8192, dtype=torch.bfloat16, device=DEVICE)
    gate_up[-3:] = randn(3, 8192, dtype=torch.bfloat16)
    y = triton_ops.silu_mul(gate_up)
    assert_few_bits_differ(y[-3:], torch_ops.silu_mul(gate_up[-3:]))
