"""v . B^T of a tile's rows and some columns, for the programs of `lora_expand` and `lora_silu_mul`.

Where a program holds a single row, multiplying is cheaper than having the matrix unit pad it to a
tile. Parts of v are added up in fp32 and rounded to the weights' dtype.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kernels.lora_stream import from_row, load_weights


class ShrunkRows(NamedTuple):
    """One module's v, of the rows of a tile."""

    # [BLOCK_ROWS, 1]: rank 0 of each row in the first part.
    ptrs: tl.tensor
    # [BLOCK_ROWS, 1]: which rows there are.
    mask: tl.tensor
    split_stride: tl.tensor


@triton.jit
def row_delta(
    b,
    weights,
    v_row_ptr,
    v_split_stride,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """fp32 [COLUMNS] of one row.

    Args:
        b: the first tile of `weights`; the caller has loaded it.
        weights: B, a row for each rank.
        v_row_ptr: rank 0 of the row's v in the first part.
    """
    rank = weights.num_rows
    splits = tl.arange(0, BLOCK_SPLITS)[:, None]
    sums = tl.zeros([b.shape[1]], dtype=tl.float32)
    for r in range(0, rank, TILE.ROWS):
        ranks = (r + tl.arange(0, TILE.ROWS))[None, :]
        v_mask = (splits < NUM_SPLITS) & (ranks < rank)
        v_ptrs = v_row_ptr + splits * v_split_stride + ranks
        parts = tl.load(v_ptrs, mask=v_mask, other=0.0)  # [S, R]
        shrunk = tl.sum(parts, 0).to(b.dtype).to(tl.float32)
        sums += tl.sum(shrunk[:, None] * b.to(tl.float32), 0)
        next_r = r + TILE.ROWS
        if next_r < rank:
            b = load_weights(from_row(weights, next_r), TILE)  # [R, N]
    return sums


@triton.jit
def shrunk_tile(
    v, first_rank, rank, BLOCK_R: tl.constexpr, NUM_SPLITS: tl.constexpr, DTYPE: tl.constexpr
):
    """[BLOCK_ROWS, BLOCK_R] of v from `first_rank` on; 0 from `rank` on.

    Args:
        first_rank: a tensor: for a constant, Triton would go through all this once more.
    """
    ranks = (first_rank + tl.arange(0, BLOCK_R))[None, :]
    mask = v.mask & (ranks < rank)
    shrunk = tl.load(v.ptrs + ranks, mask=mask, other=0.0)
    for split in tl.static_range(1, NUM_SPLITS):
        shrunk += tl.load(v.ptrs + split * v.split_stride + ranks, mask=mask, other=0.0)
    return shrunk.to(DTYPE)


@triton.jit
def tile_delta(b, shrunk, weights, v, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr):
    """fp32 [BLOCK_ROWS, COLUMNS] of a tile's rows.

    Args:
        b, weights: as of `row_delta`.
        shrunk: `shrunk_tile` of v's first ranks.
    """
    rank = weights.num_rows
    acc = tl.dot(shrunk, b, input_precision="ieee")
    # Most ranks have no more turns: buffers for them would only take room.
    for r in tl.range(TILE.ROWS, rank, TILE.ROWS, num_stages=1):
        b = load_weights(from_row(weights, r), TILE)  # [R, N]
        shrunk = shrunk_tile(v, r, rank, TILE.ROWS, NUM_SPLITS, b.dtype)
        acc = tl.dot(shrunk, b, acc, input_precision="ieee")
    return acc
