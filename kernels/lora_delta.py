"""v . B^T of a tile's rows and some columns, for the programs of `lora_expand` and `lora_silu_mul`.

Where a program holds a single row, multiplying is cheaper than having the matrix unit pad it to a
tile. Parts of v are added up in fp32 and rounded to the weights' dtype.
"""

import triton
import triton.language as tl

from kernels.lora_stream import load_weights


@triton.jit
def row_delta(
    b,
    v_row_ptr,
    v_split_stride,
    pool_ptr,
    table_ptr,
    first,
    row_elems,
    rank,
    num_columns,
    page_stride,
    NUM_SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    PAGE_ELEMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_ROW_ELEMS: tl.constexpr,
):
    """fp32 [BLOCK_N] of one row; `b` is its weights of the first BLOCK_R ranks, at `first`."""
    splits = tl.arange(0, BLOCK_SPLITS)[:, None]
    sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    for r in range(0, rank, BLOCK_R):
        ranks = (r + tl.arange(0, BLOCK_R))[None, :]
        v_mask = (splits < NUM_SPLITS) & (ranks < rank)
        v_ptrs = v_row_ptr + splits * v_split_stride + ranks
        parts = tl.load(v_ptrs, mask=v_mask, other=0.0)  # [S, R]
        shrunk = tl.sum(parts, 0).to(b.dtype).to(tl.float32)
        sums += tl.sum(shrunk[:, None] * b.to(tl.float32), 0)
        next_r = r + BLOCK_R
        if next_r < rank:
            b = load_weights(
                pool_ptr,
                table_ptr,
                first + next_r * row_elems,
                row_elems,
                rank - next_r,
                num_columns,
                page_stride,
                PAGE_ELEMS,
                BLOCK_R,
                BLOCK_N,
                MAX_ROW_ELEMS,
            )  # [R, N]
    return sums


@triton.jit
def shrunk_tile(
    v_rows_ptr,
    row_mask,
    first_rank,
    rank,
    v_split_stride,
    NUM_SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """[BLOCK_ROWS, BLOCK_R] of v from `first_rank` on, of rows at `v_rows_ptr` [BLOCK_ROWS, 1]."""
    ranks = (first_rank + tl.arange(0, BLOCK_R))[None, :]
    mask = row_mask & (ranks < rank)
    shrunk = tl.load(v_rows_ptr + ranks, mask=mask, other=0.0)
    for split in tl.static_range(1, NUM_SPLITS):
        shrunk += tl.load(v_rows_ptr + split * v_split_stride + ranks, mask=mask, other=0.0)
    return shrunk.to(DTYPE)


@triton.jit
def tile_delta(
    b,
    shrunk,
    v_rows_ptr,
    row_mask,
    v_split_stride,
    pool_ptr,
    table_ptr,
    first,
    row_elems,
    rank,
    num_columns,
    page_stride,
    NUM_SPLITS: tl.constexpr,
    PAGE_ELEMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_ROW_ELEMS: tl.constexpr,
):
    """fp32 [BLOCK_ROWS, BLOCK_N]; `b` as of `row_delta`, and `shrunk` of the same ranks."""
    acc = tl.dot(shrunk, b, input_precision="ieee")
    # Most ranks have no more turns: buffers for them would only take room.
    for r in tl.range(BLOCK_R, rank, BLOCK_R, num_stages=1):
        b = load_weights(
            pool_ptr,
            table_ptr,
            first + r * row_elems,
            row_elems,
            rank - r,
            num_columns,
            page_stride,
            PAGE_ELEMS,
            BLOCK_R,
            BLOCK_N,
            MAX_ROW_ELEMS,
        )  # [R, N]
        shrunk = shrunk_tile(
            v_rows_ptr, row_mask, r, rank, v_split_stride, NUM_SPLITS, BLOCK_R, b.dtype
        )
        acc = tl.dot(shrunk, b, acc, input_precision="ieee")
    return acc
