"""RMSNorm, with or without adding to the residual stream, in one pass over the rows.

A program takes one row, or several short ones. `torch_ops` says what is computed; rounding is at
the same places, the mean's sum in another order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# What a program takes, if its rows are shorter: 16 elements a thread, two loads of 16 bytes.
BLOCK_ELEMS = 2048
ELEMS_PER_WARP = 512
MAX_WARPS = 32


class NormLaunch(NamedTuple):
    block_rows: int
    block_features: int
    num_warps: int


def norm_launch(features: int) -> NormLaunch:
    block_features = triton.next_power_of_2(features)
    block_rows = max(1, BLOCK_ELEMS // block_features)
    num_warps = block_rows * block_features // ELEMS_PER_WARP
    return NormLaunch(block_rows, block_features, min(num_warps, MAX_WARPS))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, the mean in fp32.

    Args:
        x: [..., features], features contiguous; [rows, heads, features] may have any strides
            before them, as the heads of a fused projection do.
        weight: [features].

    Returns:
        As x, contiguous.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _launch(y, x, None, weight, eps)
    return y


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """residual += x (in place); returns rms_norm(residual, weight, eps).

    Args:
        x: [rows, features], features contiguous.
        residual: as x, mutated: the sum is rounded to its dtype before it is normalised.
        weight: [features].

    Returns:
        [rows, features], contiguous.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _launch(y, x, residual, weight, eps)
    return y


def _launch(
    y: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> None:
    features = x.shape[-1]
    assert x.stride(-1) == weight.stride(0) == 1, "features are contiguous"
    heads = x.shape[-2] if x.dim() > 2 else 1
    x = x.reshape(-1, heads, features)
    num_rows = x.shape[0] * heads
    residual_stride = 0
    if residual is not None:
        assert residual.shape == y.shape and y.dim() == 2, "residual rows are those of x"
        assert residual.stride(-1) == 1, "features are contiguous"
        residual_stride = residual.stride(0)
    launch = norm_launch(features)
    _norm_kernel[(triton.cdiv(num_rows, launch.block_rows),)](
        y,
        x,
        residual,
        weight,
        eps,
        num_rows,
        x.stride(0),
        x.stride(1),
        residual_stride,
        HEADS=heads,
        FEATURES=features,
        BLOCK_ROWS=launch.block_rows,
        BLOCK_FEATURES=launch.block_features,
        num_warps=launch.num_warps,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    y_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    eps,
    num_rows,
    x_stride,
    x_head_stride,
    residual_stride,
    HEADS: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """y of BLOCK_ROWS rows; row r of x is head r % HEADS of its row r // HEADS."""
    columns = tl.arange(0, BLOCK_FEATURES)[None, :]
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column_mask = columns < FEATURES
    mask = (rows < num_rows) & column_mask
    x_offsets = rows // HEADS * x_stride + rows % HEADS * x_head_stride + columns
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0)  # [R, F]
    # Before the mean, so that it arrives meanwhile.
    weight = tl.load(weight_ptr + columns, mask=column_mask, other=0.0)  # [1, F]
    x32 = x.to(tl.float32)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows * residual_stride + columns
        residual = tl.load(residual_ptrs, mask=mask, other=0.0)
        total = (x32 + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptrs, total, mask=mask)
        x32 = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x32 * x32, 1) / FEATURES + eps)
    normed = (x32 * inverse[:, None]).to(x.dtype)
    # The product of two elements of 16 bits is exact in fp32: it is rounded once.
    y = normed.to(tl.float32) * weight.to(tl.float32)
    tl.store(y_ptr + rows * FEATURES + columns, y.to(x.dtype), mask=mask)
