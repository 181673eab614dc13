"""RMSNorm, the twin's and the kernel's, against fp64 math."""

from types import ModuleType

import pytest
import torch

from kernels import torch_ops, triton_ops
from kernels.rms_norm import norm_launch
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

EPS = 1e-5


def _weight(features: int, dtype: torch.dtype) -> torch.Tensor:
    return 1 + randn(features, dtype=dtype, seed=1)


@EVERY_OPS
@EVERY_DTYPE
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (2050, 1), (3, 5), (7, 64), (2, 1023), (0, 8), (2, 5120), (1, 16384)]
    + [(3, 4, 16), (9, 5, 80), (17, 1, 128), (0, 3, 8), (4, 0, 8), (2, 3, 2, 8), (24,)],
)
def test_rms_norm(ops: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), _weight(shape[-1], dtype)
    y = ops.rms_norm(x, weight, EPS)
    assert y.dtype == dtype and y.shape == x.shape
    assert_close(y, naive.rms_norm(x, weight, EPS), dtype)


@EVERY_OPS
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_eps_counts(ops: ModuleType, eps: float) -> None:
    x, weight = 0.1 * randn(3, 40), _weight(40, torch.float32)
    assert_close(ops.rms_norm(x, weight, eps), naive.rms_norm(x, weight, eps), torch.float32)


@EVERY_OPS
def test_means_in_fp32(ops: ModuleType) -> None:
    # Squares of 300 overflow fp16.
    x = torch.full((2, 128), 300.0, dtype=torch.float16, device=DEVICE)
    y = ops.rms_norm(x, torch.ones_like(x[0]), 1e-6)
    assert_close(y, torch.ones(2, 128, dtype=torch.float64), torch.float16)


@EVERY_OPS
@EVERY_DTYPE
@pytest.mark.parametrize("num_heads,head_dim", [(4, 32), (3, 80), (1, 128)])
def test_heads_of_a_fused_projection(
    ops: ModuleType, num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    fused, weight = randn(21, 3 * num_heads * head_dim + 64, dtype=dtype), _weight(head_dim, dtype)
    x = fused[:, 64 : 64 + num_heads * head_dim].view(21, num_heads, head_dim)
    assert torch.equal(ops.rms_norm(x, weight, EPS), ops.rms_norm(x.contiguous(), weight, EPS))


@EVERY_OPS
@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(1, 3), (5, 65), (37, 64), (0, 8), (3, 4096)])
def test_add_rms_norm_updates_the_residual(
    ops: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, residual = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=2)
    weight, x_before = _weight(shape[-1], dtype), x.clone()
    expected, total = naive.add_rms_norm(x, residual, weight, EPS)
    y = ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    assert torch.equal(x, x_before)
    assert_close(y, expected, dtype)


@EVERY_OPS
def test_add_rms_norm_of_wider_rows(ops: ModuleType) -> None:
    wide_x, wide_residual = randn(6, 96), randn(6, 80, seed=2)
    x, residual, weight = wide_x[:, 32:96], wide_residual[:, :64], _weight(64, torch.float32)
    beside = wide_residual[:, 64:].clone()
    expected, total = naive.add_rms_norm(x, residual, weight, EPS)
    y = ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    assert torch.equal(wide_residual[:, 64:], beside)
    assert_close(y, expected, torch.float32)


@EVERY_16_BIT_DTYPE
def test_kernel_rounds_where_the_twin_does(dtype: torch.dtype) -> None:
    x, weight = randn(20, 500, dtype=dtype), _weight(500, dtype)
    residual = randn(20, 500, dtype=dtype, seed=2)
    twin_residual = residual.clone()
    assert_few_bits_differ(triton_ops.rms_norm(x, weight, EPS), torch_ops.rms_norm(x, weight, EPS))
    assert_few_bits_differ(
        triton_ops.add_rms_norm(x, residual, weight, EPS),
        torch_ops.add_rms_norm(x, twin_residual, weight, EPS),
    )
    assert torch.equal(residual, twin_residual)


def test_launches_cover_the_features() -> None:
    for features in range(1, 16385):
        block_rows, block_features, num_warps = norm_launch(features)
        assert features <= block_features < 2 * features
        assert num_warps.bit_count() == 1 and num_warps <= 32
        assert 32 * num_warps <= block_rows * block_features


@gpu_test
@pytest.mark.parametrize("rows", [1, 64, 256])
def test_graph_replay_equals_eager(rows: int) -> None:
    weight = _weight(4096, torch.bfloat16)
    batches = [
        tuple(randn(rows, 4096, dtype=torch.bfloat16, seed=seed + i) for i in range(2))
        for seed in (10, 20)
    ]
    assert_replay_equals_eager(
        lambda x, residual: triton_ops.add_rms_norm(x, residual, weight, EPS), batches
    )
    assert_replay_equals_eager(
        lambda x, _: triton_ops.rms_norm(x.view(rows, 32, 128), weight[:128], EPS), batches
    )


@gpu_test
def test_more_elements_than_an_int32_counts() -> None:
    x = torch.ones(2**31 // 4096 + 3, 4096, dtype=torch.bfloat16, device=DEVICE)
    x[-3:] = randn(3, 4096, dtype=torch.bfloat16)
    weight = _weight(4096, torch.bfloat16)
    y = triton_ops.rms_norm(x, weight, EPS)
    assert_few_bits_differ(y[-3:], torch_ops.rms_norm(x[-3:], weight, EPS))
