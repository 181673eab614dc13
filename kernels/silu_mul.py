"""The gated activation of the MLP: y = silu(gate) * up, in one pass over the fused projection.

A program takes a block of columns of one row. `torch_ops.silu_mul` says what is computed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# 8 elements a thread, one load of 16 bytes each of gate and up, twice where there are many rows.
SMALL_BLOCK = 1024
LARGE_BLOCK = 2048
NUM_WARPS = 4
# Several waves of programs of a large GPU: only then do larger ones leave no multiprocessor idle.
MANY_ELEMS = 2**23


class SiluLaunch(NamedTuple):
    block: int
    num_warps: int


def silu_launch(rows: int, intermediate: int) -> SiluLaunch:
    block = LARGE_BLOCK if rows * intermediate >= MANY_ELEMS else SMALL_BLOCK
    return SiluLaunch(min(block, triton.next_power_of_2(intermediate)), NUM_WARPS)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """y = silu(gate) * up for gate_up [rows, 2 * intermediate] = [gate | up].

    silu is computed in fp32 and rounded to the dtype before it is multiplied, as torch does.

    Args:
        gate_up: columns contiguous.

    Returns:
        [rows, intermediate], contiguous.
    """
    rows, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1, "columns are contiguous"
    y = torch.empty(rows, intermediate, dtype=gate_up.dtype, device=gate_up.device)
    if not y.numel():
        return y
    launch = silu_launch(rows, intermediate)
    # Rows are in the one dimension of a grid that is not limited to 65,535.
    _silu_mul_kernel[(rows * triton.cdiv(intermediate, launch.block),)](
        y,
        gate_up,
        gate_up.stride(0),
        INTERMEDIATE=intermediate,
        NUM_BLOCKS=triton.cdiv(intermediate, launch.block),
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
    return y


@triton.jit
def _silu_mul_kernel(
    y_ptr,
    gate_up_ptr,
    gate_up_stride,
    INTERMEDIATE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of a row; a row's blocks are neighbours."""
    row = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    columns = tl.program_id(0) % NUM_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    mask = columns < INTERMEDIATE
    gate_ptrs = gate_up_ptr + row * gate_up_stride + columns
    gate = tl.load(gate_ptrs, mask=mask, other=0.0)
    up = tl.load(gate_ptrs + INTERMEDIATE, mask=mask, other=0.0)
    tl.store(y_ptr + row * INTERMEDIATE + columns, silu_product(gate, up), mask=mask)


@triton.jit
def silu_product(gate, up):
    """silu(gate) * up; silu is rounded to the dtype before it is multiplied."""
    gate32 = gate.to(tl.float32)
    silu = (gate32 / (1 + tl.exp(-gate32))).to(gate.dtype)
    # The product of two elements of 16 bits is exact in fp32: it is rounded once.
    return (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
