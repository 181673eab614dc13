"""y += scaling * v . B^T for every row's own adapter, whose weights lie on pages of the pool.

A program takes a tile of rows of one adapter and some columns of one module; nobody else writes
there. `lora_shrink` made v.
"""

from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl

from kernels.dependent_launch import (
    launch_options,
    let_next_start,
    wait_for_previous,
    wait_without_work,
)
from kernels.launch_configs import ExpandLaunch, expand_launch
from kernels.lora_delta import ShrunkRows, row_delta, shrunk_tile, tile_delta
from kernels.lora_segments import LoraSegments
from kernels.lora_stream import (
    VARYING_POINTERS,
    Stream,
    Weights,
    from_column,
    load_weights,
    pick,
    tile_shape,
)
from kernels.row_alignment import row_elems


def lora_expand(
    y: torch.Tensor,
    v: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    modules: tuple[int, ...],
    out_offsets: tuple[int, ...],
    segments: LoraSegments,
    *,
    launch: ExpandLaunch | None = None,
) -> None:
    """y[t, o_m : o_m + out_m] += scaling * v[:, m, t, :r].sum(0) . B[slot(t), layer, modules[m]]^T.

    The parts of v are added up in fp32 and rounded to the weights' dtype; the product is scaled
    and added to y in fp32. Rows of the base model and modules an adapter lacks are not touched,
    bit for bit. The same input gives the same bits; the grid depends on shapes alone.

    Args:
        y: [rows, features], row-contiguous, mutated: the concatenated outputs of `modules`.
        v: what `lora_shrink` returned for the same modules and segments.
        out_offsets: len(modules) + 1 bounds; module m owns columns
            [out_offsets[m], out_offsets[m + 1]).
        segments: with tiles.
        launch: instead of what `expand_launch` chooses.
    """
    tiles = segments.tiles
    assert tiles is not None, "the Triton kernels run over tiles"
    page_elems = pool.shape[2]
    num_tiles = tiles.slots.shape[0]
    if not num_tiles:
        return
    widths = [right - left for left, right in pairwise(out_offsets)]
    launch = launch or expand_launch(tiles.block_rows, segments.max_rank, pool.itemsize)
    launch = launch.fit(max(widths), page_elems)
    # Every module has blocks of its own: none holds columns of two.
    first_blocks = list(accumulate((triton.cdiv(n, launch.block_n) for n in widths), initial=0))
    layer_offsets = segments.offsets[:, layer]
    layer_scaling = segments.scaling[:, layer]
    _expand_kernel[(first_blocks[-1], num_tiles)](
        y,
        v,
        pool[:, layer],
        segments.page_tables,
        layer_offsets,
        layer_scaling,
        tiles.slots,
        tiles.row_starts,
        tiles.row_ends,
        tiles.shares,
        tiles.num_shares,
        y.stride(0),
        pool.stride(0),
        segments.page_tables.stride(0),
        layer_offsets.stride(0),
        layer_scaling.stride(0),
        v.stride(0),
        v.stride(1),
        v.stride(2),
        MODULES=modules,
        NUM_MODULES=len(modules),
        OUT_OFFSETS=out_offsets[:-1],
        WIDTHS=tuple(widths),
        ROW_ELEMS=tuple(map(row_elems, widths)),
        MAX_ROW_ELEMS=row_elems(max(widths)),
        FIRST_BLOCKS=tuple(first_blocks[:-1]),
        NUM_SPLITS=v.shape[0],
        BLOCK_SPLITS=triton.next_power_of_2(v.shape[0]),
        PAGE_ELEMS=page_elems,
        BLOCK_N=launch.block_n,
        DOT_BLOCK_N=launch.dot_block_n,
        ROW_BLOCK_R=launch.row_block_r,
        DOT_BLOCK_R=launch.dot_block_r,
        BLOCK_ROWS=tiles.block_rows,
        num_warps=launch.num_warps,
        **launch_options(y),
    )


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=VARYING_POINTERS)
def _expand_kernel(
    y_ptr,
    v_ptr,
    pool_ptr,
    page_tables_ptr,
    offsets_ptr,
    scaling_ptr,
    tile_slots_ptr,
    tile_starts_ptr,
    tile_ends_ptr,
    tile_shares_ptr,
    tile_num_shares_ptr,
    y_stride,
    page_stride,
    table_stride,
    slot_stride,
    scaling_stride,
    v_split_stride,
    v_module_stride,
    v_row_stride,
    MODULES: tl.constexpr,
    NUM_MODULES: tl.constexpr,
    OUT_OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    ROW_ELEMS: tl.constexpr,
    MAX_ROW_ELEMS: tl.constexpr,
    FIRST_BLOCKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    PAGE_ELEMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT_BLOCK_N: tl.constexpr,
    ROW_BLOCK_R: tl.constexpr,
    DOT_BLOCK_R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_N columns of one module, of a tile's rows."""
    let_next_start(DEPENDENT)
    tile = tl.program_id(1)
    slot = tl.load(tile_slots_ptr + tile).to(tl.int64)
    row_start = tl.load(tile_starts_ptr + tile).to(tl.int64)
    row_end = tl.load(tile_ends_ptr + tile)
    # As in the shrink kernel, tests for an early end ask for all that is loaded before.
    if (slot < 0) | (row_end <= row_start):
        wait_without_work(DEPENDENT)
        return
    block = tl.program_id(0)
    m = 0
    for i in tl.static_range(1, NUM_MODULES):
        m += (block >= FIRST_BLOCKS[i]).to(tl.int32)
    module = pick(MODULES, m, NUM_MODULES)
    descriptor_ptr = offsets_ptr + slot * slot_stride + module * 3
    rank = tl.load(descriptor_ptr)
    offset_b = tl.multiple_of(tl.load(descriptor_ptr + 2), 64)
    if (rank == 0) | (offset_b < 0):
        wait_without_work(DEPENDENT)
        return
    scaling = tl.load(scaling_ptr + slot * scaling_stride + module)
    row_elems = pick(ROW_ELEMS, m, NUM_MODULES)
    first_column = (block - pick(FIRST_BLOCKS, m, NUM_MODULES)) * BLOCK_N
    num_columns = pick(WIDTHS, m, NUM_MODULES) - first_column
    first = offset_b + first_column
    stream = Stream(
        pool_ptr=pool_ptr,
        table_ptr=page_tables_ptr + slot * table_stride,
        page_stride=page_stride,
    )
    weights = Weights(
        stream=stream,
        first=first,
        row_elems=row_elems,
        num_rows=rank,
        num_columns=num_columns,
    )
    v_ptr += tl.cast(m, tl.int64) * v_module_stride
    y_ptr += pick(OUT_OFFSETS, m, NUM_MODULES) + first_column
    dtype = y_ptr.dtype.element_ty

    if row_end - row_start == 1:
        ROW_TILE: tl.constexpr = tile_shape(ROW_BLOCK_R, BLOCK_N, PAGE_ELEMS, MAX_ROW_ELEMS)
        columns = tl.arange(0, BLOCK_N)
        y_row_ptr = y_ptr + row_start * y_stride + columns
        b = load_weights(weights, ROW_TILE)  # [R, N]
        wait_for_previous(DEPENDENT)
        y = tl.load(y_row_ptr, mask=columns < num_columns)
        v_row_ptr = v_ptr + row_start * v_row_stride
        delta = row_delta(b, weights, v_row_ptr, v_split_stride, ROW_TILE, NUM_SPLITS, BLOCK_SPLITS)
        y = (y.to(tl.float32) + scaling * delta).to(dtype)
        tl.store(y_row_ptr, y, mask=columns < num_columns)
    else:
        TILE: tl.constexpr = tile_shape(DOT_BLOCK_R, DOT_BLOCK_N, PAGE_ELEMS, MAX_ROW_ELEMS)
        rows = (row_start + tl.arange(0, BLOCK_ROWS))[:, None]
        row_mask = rows < row_end
        y_rows_ptr = y_ptr + rows * y_stride
        v = ShrunkRows(ptrs=v_ptr + rows * v_row_stride, mask=row_mask, split_stride=v_split_stride)
        start = tl.load(tile_shares_ptr + tile) * DOT_BLOCK_N
        step = tl.load(tile_num_shares_ptr + tile) * DOT_BLOCK_N
        b_tile = load_weights(from_column(weights, start), TILE)  # [R, N]
        wait_for_previous(DEPENDENT)
        first_rank = tl.cast(0, tl.int32)
        shrunk = shrunk_tile(v, first_rank, rank, DOT_BLOCK_R, NUM_SPLITS, b_tile.dtype)
        for n in range(start, BLOCK_N, step):
            columns = (n + tl.arange(0, DOT_BLOCK_N))[None, :]
            y_mask = row_mask & (columns < num_columns)
            y = tl.load(y_rows_ptr + columns, mask=y_mask)  # [T, N]
            has_next = n + step < BLOCK_N
            turn = from_column(weights, n)
            next_tile = load_weights(from_column(turn, step, is_used=has_next), TILE)
            delta = tile_delta(b_tile, shrunk, turn, v, TILE, NUM_SPLITS)
            y = (y.to(tl.float32) + scaling * delta).to(dtype)
            tl.store(y_rows_ptr + columns, y, mask=y_mask)
            b_tile = next_tile
