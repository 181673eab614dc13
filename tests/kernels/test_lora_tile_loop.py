"""Tiles of rows whose programs take several turns over columns and ranks, against dense math."""

from dataclasses import replace

import pytest
import torch

from kernels import triton_ops
from kernels.launch_configs import ExpandLaunch
from kernels.lora_segments import LoraTiles, Tile
from tests.kernels import naive
from tests.kernels.cases import DEVICE, SHAPE_DTYPES, LoraCase, assert_close, make_lora_case
from tests.kernels.elementwise import randn

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Three turns of ranks, five, one and none: slot 3 lacks the second module.
RANKS = [[33, 33], [80, 80], [16, 16], [33, 0]]
RUNS = [(0, 16), (1, 20), (2, 32), (3, 16)]
# Programs of 256 columns in turns of 64: of 410 the second ends in its third turn, of 290 in its
# first.
LAUNCH = ExpandLaunch(block_n=256, dot_block_n=64, row_block_r=8, dot_block_r=16, num_warps=4)
IN_FEATURES = 48

each_dtype = pytest.mark.parametrize("dtype", SHAPE_DTYPES)
each_loop = pytest.mark.parametrize("num_shares,width", [(1, 410), (2, 290)])


def _make_case(dtype: torch.dtype, width: int, num_shares: int) -> tuple[LoraCase, torch.Tensor]:
    """The case on the device, with tiles in so many shares, and x of the shrink, on the CPU."""
    case = make_lora_case(RUNS, RANKS, [(IN_FEATURES, width)] * 2, dtype=dtype, block_rows=16)
    tiles = []
    start = 0
    for slot, count in RUNS:
        for row in range(start, start + count, 16):
            end = min(row + 16, start + count)
            tiles += [Tile(slot, row, end, share, num_shares) for share in range(num_shares)]
        start += count
    segments = replace(case.segments, tiles=LoraTiles.of(tiles, 16))
    return replace(case, segments=segments).to(DEVICE), randn(start, IN_FEATURES, dtype=dtype).cpu()


def _deltas(case: LoraCase, x: torch.Tensor, width: int) -> torch.Tensor:
    """fp64 [rows, 2 * width], of both modules."""
    return torch.cat([case.deltas(x, 0, module, width) for module in range(2)], 1)


@each_dtype
@each_loop
def test_expand(num_shares: int, width: int, dtype: torch.dtype) -> None:
    case, x = _make_case(dtype, width, num_shares)
    y = randn(len(x), 2 * width, dtype=dtype, seed=1)
    expected = y.double().cpu() + _deltas(case, x, width)
    v = triton_ops.lora_shrink(x.to(DEVICE), case.pool, 0, (0, 1), case.segments)
    bounds = (0, width, 2 * width)
    triton_ops.lora_expand(y, v, case.pool, 0, (0, 1), bounds, case.segments, launch=LAUNCH)
    # Sums reach five.
    assert_close(y / 4, expected / 4, dtype)


@each_dtype
@each_loop
def test_silu_mul(num_shares: int, width: int, dtype: torch.dtype) -> None:
    case, x = _make_case(dtype, width, num_shares)
    gate_up = randn(len(x), 2 * width, dtype=dtype, seed=1)
    expected = naive.lora_silu_mul(gate_up.cpu(), _deltas(case, x, width))
    v = triton_ops.lora_shrink(x.to(DEVICE), case.pool, 0, (0, 1), case.segments)
    y = triton_ops.lora_silu_mul(gate_up, v, case.pool, 0, (0, 1), case.segments, launch=LAUNCH)
    # Outputs reach ten, and their inputs were rounded before.
    assert_close(y / 8, expected / 8, dtype)
