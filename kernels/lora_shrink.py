"""v = x . A^T for every row's own adapter, whose weights lie on pages of the unified pool.

A program takes a tile of rows of one adapter, some ranks of one module and a part of in_features,
reads weights at their true rank and writes its own place of v. Segmented gathering of mixed ranks
is from S-LoRA (Sheng et al., 2023, section 5.3) and Punica (Chen et al., 2023, section 4).
"""

import torch
import triton
import triton.language as tl

from kernels.dependent_launch import (
    launch_options,
    let_next_start,
    wait_for_previous,
    wait_without_work,
)
from kernels.launch_configs import ShrinkLaunch, shrink_launch
from kernels.lora_segments import LoraSegments
from kernels.lora_stream import (
    VARYING_POINTERS,
    Stream,
    Weights,
    find_pages,
    from_column,
    load_on_pages,
    load_weights,
    pick,
    tile_shape,
)
from kernels.row_alignment import row_elems


def lora_shrink(
    x: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    modules: tuple[int, ...],
    segments: LoraSegments,
    *,
    launch: ShrinkLaunch | None = None,
) -> torch.Tensor:
    """v[s, m, t, :r] = x[t, part s] . A[slot(t), layer, modules[m]][:, part s]^T.

    Nothing is added by atomics: the same input gives the same bits. The grid depends on shapes
    alone, so a captured CUDA graph serves whatever its tensors hold.

    Args:
        x: [rows, in_features], row-contiguous, shared by all `modules`.
        modules: indices of modules that read the same input (q, k, v; gate, up).
        segments: with tiles.
        launch: instead of what `shrink_launch` chooses.

    Returns:
        fp32 [num_splits, len(modules), rows, max_rank]: sums over parts of in_features, to be
        added up. Columns from the row's rank on, rows of the base model and modules an adapter
        lacks are not written.
    """
    tiles = segments.tiles
    assert tiles is not None, "the Triton kernels run over tiles"
    num_rows, in_features = x.shape
    page_elems = pool.shape[2]
    num_tiles = tiles.slots.shape[0]
    launch = launch or shrink_launch(
        num_rows, tiles.block_rows, len(modules), segments.max_rank, in_features, pool.itemsize
    )
    launch = launch.fit(in_features, page_elems)
    split_k = launch.split_k(in_features)
    num_splits = triton.cdiv(in_features, split_k)
    shape = num_splits, len(modules), num_rows, segments.max_rank
    v = torch.empty(shape, dtype=torch.float32, device=x.device)
    if not num_tiles:
        return v
    num_rank_tiles = triton.cdiv(segments.max_rank, launch.block_r)
    grid = (len(modules) * num_rank_tiles, num_splits, num_tiles)
    layer_offsets = segments.offsets[:, layer]
    _shrink_kernel[grid](
        v,
        x,
        pool[:, layer],
        segments.page_tables,
        layer_offsets,
        tiles.slots,
        tiles.row_starts,
        tiles.row_ends,
        tiles.shares,
        x.stride(0),
        pool.stride(0),
        segments.page_tables.stride(0),
        layer_offsets.stride(0),
        v.stride(0),
        v.stride(1),
        v.stride(2),
        num_rank_tiles,
        MODULES=modules,
        NUM_MODULES=len(modules),
        IN_FEATURES=in_features,
        ROW_ELEMS=row_elems(in_features),
        PAGE_ELEMS=page_elems,
        SPLIT_K=split_k,
        CHUNK_K=launch.chunk_k(split_k, page_elems),
        ROW_BLOCK_K=launch.row_block_k,
        DOT_BLOCK_K=launch.dot_block_k,
        BLOCK_R=launch.block_r,
        BLOCK_ROWS=tiles.block_rows,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch_options(x),
    )
    return v


@triton.jit(
    do_not_specialize=["table_stride", "num_rank_tiles"],
    do_not_specialize_on_alignment=VARYING_POINTERS,
)
def _shrink_kernel(
    v_ptr,
    x_ptr,
    pool_ptr,
    page_tables_ptr,
    offsets_ptr,
    tile_slots_ptr,
    tile_starts_ptr,
    tile_ends_ptr,
    tile_shares_ptr,
    x_stride,
    page_stride,
    table_stride,
    slot_stride,
    v_split_stride,
    v_module_stride,
    v_row_stride,
    num_rank_tiles,
    MODULES: tl.constexpr,
    NUM_MODULES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    ROW_ELEMS: tl.constexpr,
    PAGE_ELEMS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    CHUNK_K: tl.constexpr,
    ROW_BLOCK_K: tl.constexpr,
    DOT_BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """SPLIT_K columns for BLOCK_R ranks of one module, of a tile's rows."""
    let_next_start(DEPENDENT)
    tile = tl.program_id(2)
    slot = tl.load(tile_slots_ptr + tile).to(tl.int64)
    row_start = tl.load(tile_starts_ptr + tile).to(tl.int64)
    row_end = tl.load(tile_ends_ptr + tile)
    share = tl.load(tile_shares_ptr + tile)
    # The tests for an early end, here and below, ask for all that was loaded: what no test needs is
    # loaded after it, and loads that wait for one another are most of a small launch's time.
    if (slot < 0) | (row_end <= row_start) | (share > 0):
        wait_without_work(DEPENDENT)
        return
    m = tl.program_id(0) // num_rank_tiles
    first_rank = tl.program_id(0) % num_rank_tiles * BLOCK_R
    descriptor_ptr = offsets_ptr + slot * slot_stride + pick(MODULES, m, NUM_MODULES) * 3
    rank = tl.load(descriptor_ptr)
    offset_a = tl.multiple_of(tl.load(descriptor_ptr + 1), 64)
    if (rank <= first_rank) | (offset_a < 0):
        wait_without_work(DEPENDENT)
        return
    split = tl.program_id(1)
    first_column = split * SPLIT_K
    first = offset_a + first_rank * ROW_ELEMS + first_column
    num_ranks = rank - first_rank
    num_columns = IN_FEATURES - first_column
    stream = Stream(
        pool_ptr=pool_ptr,
        table_ptr=page_tables_ptr + slot * table_stride,
        page_stride=page_stride,
    )
    weights = Weights(
        stream=stream,
        first=first,
        row_elems=ROW_ELEMS,
        num_rows=num_ranks,
        num_columns=num_columns,
    )
    ranks = tl.arange(0, BLOCK_R)
    v_ptr += split.to(tl.int64) * v_split_stride + m.to(tl.int64) * v_module_stride + first_rank

    if row_end - row_start == 1:
        # Multiplying a single row is cheaper than having the matrix unit pad it to a tile.
        x_row_ptr = x_ptr + row_start * x_stride + first_column
        sums = tl.zeros([BLOCK_R], dtype=tl.float32)
        TILE: tl.constexpr = tile_shape(BLOCK_R, ROW_BLOCK_K, PAGE_ELEMS, ROW_ELEMS)
        a = load_weights(weights, TILE)  # [R, K]
        wait_for_previous(DEPENDENT)
        for k in range(0, SPLIT_K, ROW_BLOCK_K):
            columns = k + tl.arange(0, ROW_BLOCK_K)
            x = tl.load(x_row_ptr + columns, mask=columns < num_columns, other=0.0)
            sums += tl.sum(a.to(tl.float32) * x.to(tl.float32)[None, :], 1)
            if SPLIT_K > ROW_BLOCK_K:
                next_k = k + ROW_BLOCK_K
                a = load_weights(from_column(weights, next_k, is_used=next_k < SPLIT_K), TILE)
        tl.store(v_ptr + row_start * v_row_stride + ranks, sums, mask=ranks < num_ranks)
    else:
        CHUNK: tl.constexpr = tile_shape(BLOCK_R, CHUNK_K, PAGE_ELEMS, ROW_ELEMS)
        DOT_TILE: tl.constexpr = tile_shape(BLOCK_R, DOT_BLOCK_K, PAGE_ELEMS, ROW_ELEMS)
        rows = (row_start + tl.arange(0, BLOCK_ROWS))[:, None]
        x_rows_ptr = x_ptr + rows * x_stride + first_column
        acc = tl.zeros([BLOCK_ROWS, BLOCK_R], dtype=tl.float32)
        wait_for_previous(DEPENDENT)
        for chunk in range(0, SPLIT_K, CHUNK_K):
            pages = find_pages(from_column(weights, chunk), CHUNK)
            for k in range(chunk, chunk + CHUNK_K, DOT_BLOCK_K):
                columns = (k + tl.arange(0, DOT_BLOCK_K))[None, :]
                x_mask = (rows < row_end) & (columns < num_columns)
                x_tile = tl.load(x_rows_ptr + columns, mask=x_mask, other=0.0)  # [T, K]
                a = load_on_pages(from_column(weights, k), pages, DOT_TILE)  # [R, K]
                acc = tl.dot(x_tile, tl.trans(a), acc, input_precision="ieee")
        v_mask = (rows < row_end) & (ranks[None, :] < num_ranks)
        tl.store(v_ptr + rows * v_row_stride + ranks[None, :], acc, mask=v_mask)
