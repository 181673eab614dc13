"""silu(gate) * up of a fused projection to which each row's adapter delta is still to be added.

As `lora_expand` and then `silu_mul`, in one pass: a projection of many rows is read once and not
written again. A program takes a tile of rows and the same columns of gate and up.
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
from kernels.launch_configs import ExpandLaunch, lora_silu_launch
from kernels.lora_delta import ShrunkRows, row_delta, shrunk_tile, tile_delta
from kernels.lora_segments import LoraSegments
from kernels.lora_stream import (
    VARYING_POINTERS,
    Stream,
    Weights,
    from_column,
    load_weights,
    tile_shape,
)
from kernels.row_alignment import row_elems
from kernels.silu_mul import silu_product


def lora_silu_mul(
    gate_up: torch.Tensor,
    v: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    modules: tuple[int, int],
    segments: LoraSegments,
    *,
    launch: ExpandLaunch | None = None,
) -> torch.Tensor:
    """y = silu(gate) * up of gate_up [rows, 2 * intermediate] = [gate | up] plus its delta.

    Rounds where `lora_expand` and `silu_mul` do. Rows of the base model and modules an adapter
    lacks have the bits of `silu_mul`. The grid depends on shapes alone.

    Args:
        gate_up: columns contiguous; what it holds afterwards is not specified.
        v: what `lora_shrink` returned for the same modules and segments.
        modules: indices of the modules of gate and of up.
        segments: with tiles.
        launch: instead of what `lora_silu_launch` chooses.

    Returns:
        [rows, intermediate], contiguous. Rows of no tile, which pad a batch, are not written.
    """
    tiles = segments.tiles
    assert tiles is not None, "the Triton kernels run over tiles"
    assert gate_up.stride(1) == 1, "columns are contiguous"
    rows, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, intermediate, dtype=gate_up.dtype, device=gate_up.device)
    num_tiles = tiles.slots.shape[0]
    if not num_tiles:
        return y
    page_elems = pool.shape[2]
    launch = launch or lora_silu_launch(tiles.block_rows, segments.max_rank, pool.itemsize)
    launch = launch.fit(intermediate, page_elems)
    layer_offsets = segments.offsets[:, layer]
    layer_scaling = segments.scaling[:, layer]
    _lora_silu_mul_kernel[(triton.cdiv(intermediate, launch.block_n), num_tiles)](
        y,
        gate_up,
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
        gate_up.stride(0),
        pool.stride(0),
        segments.page_tables.stride(0),
        layer_offsets.stride(0),
        layer_scaling.stride(0),
        v.stride(0),
        v.stride(1),
        v.stride(2),
        GATE=modules[0],
        UP=modules[1],
        INTERMEDIATE=intermediate,
        ROW_ELEMS=row_elems(intermediate),
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
    return y


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=VARYING_POINTERS)
def _lora_silu_mul_kernel(
    y_ptr,
    gate_up_ptr,
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
    gate_up_stride,
    page_stride,
    table_stride,
    slot_stride,
    scaling_stride,
    v_split_stride,
    v_module_stride,
    v_row_stride,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    ROW_ELEMS: tl.constexpr,
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
    """BLOCK_N columns of a tile's rows, of gate and of up."""
    let_next_start(DEPENDENT)
    tile = tl.program_id(1)
    slot = tl.load(tile_slots_ptr + tile).to(tl.int64)
    row_start = tl.load(tile_starts_ptr + tile).to(tl.int64)
    row_end = tl.load(tile_ends_ptr + tile)
    if row_end <= row_start:
        wait_without_work(DEPENDENT)
        return
    # Rows of the base model have modules of rank 0.
    has_lora = slot >= 0
    slot = tl.maximum(slot, 0)
    gate_ptr = offsets_ptr + slot * slot_stride + GATE * 3
    up_ptr = offsets_ptr + slot * slot_stride + UP * 3
    gate_rank = tl.load(gate_ptr, mask=has_lora, other=0)
    up_rank = tl.load(up_ptr, mask=has_lora, other=0)
    gate_first = tl.multiple_of(tl.load(gate_ptr + 2), 64)
    up_first = tl.multiple_of(tl.load(up_ptr + 2), 64)
    gate_scaling = tl.load(scaling_ptr + slot * scaling_stride + GATE)
    up_scaling = tl.load(scaling_ptr + slot * scaling_stride + UP)
    stream = Stream(
        pool_ptr=pool_ptr,
        table_ptr=page_tables_ptr + slot * table_stride,
        page_stride=page_stride,
    )
    first_column = tl.program_id(0) * BLOCK_N
    num_columns = INTERMEDIATE - first_column
    gate_weights = Weights(
        stream=stream,
        first=gate_first + first_column,
        row_elems=ROW_ELEMS,
        num_rows=gate_rank,
        num_columns=num_columns,
    )
    up_weights = Weights(
        stream=stream,
        first=up_first + first_column,
        row_elems=ROW_ELEMS,
        num_rows=up_rank,
        num_columns=num_columns,
    )
    gate_up_ptr += first_column
    y_ptr += first_column

    if row_end - row_start == 1:
        ROW_TILE: tl.constexpr = tile_shape(ROW_BLOCK_R, BLOCK_N, PAGE_ELEMS, ROW_ELEMS)
        columns = tl.arange(0, BLOCK_N)
        mask = columns < num_columns
        gate_b = load_weights(gate_weights, ROW_TILE)  # [R, N]
        up_b = load_weights(up_weights, ROW_TILE)
        wait_for_previous(DEPENDENT)
        gate_ptrs = gate_up_ptr + row_start * gate_up_stride + columns
        gate = tl.load(gate_ptrs, mask=mask, other=0.0)
        up = tl.load(gate_ptrs + INTERMEDIATE, mask=mask, other=0.0)
        v_row_ptr = v_ptr + row_start * v_row_stride
        gate_delta = row_delta(
            gate_b, gate_weights, v_row_ptr, v_split_stride, ROW_TILE, NUM_SPLITS, BLOCK_SPLITS
        )
        v_row_ptr += v_module_stride
        up_delta = row_delta(
            up_b, up_weights, v_row_ptr, v_split_stride, ROW_TILE, NUM_SPLITS, BLOCK_SPLITS
        )
        gate = _changed(gate, gate_delta, gate_scaling, gate_rank)
        up = _changed(up, up_delta, up_scaling, up_rank)
        tl.store(y_ptr + row_start * INTERMEDIATE + columns, silu_product(gate, up), mask=mask)
    else:
        TILE: tl.constexpr = tile_shape(DOT_BLOCK_R, DOT_BLOCK_N, PAGE_ELEMS, ROW_ELEMS)
        rows = (row_start + tl.arange(0, BLOCK_ROWS))[:, None]
        row_mask = rows < row_end
        start = tl.load(tile_shares_ptr + tile) * DOT_BLOCK_N
        step = tl.load(tile_num_shares_ptr + tile) * DOT_BLOCK_N
        v_ptrs = v_ptr + rows * v_row_stride
        gate_v = ShrunkRows(ptrs=v_ptrs, mask=row_mask, split_stride=v_split_stride)
        v_ptrs += v_module_stride
        up_v = ShrunkRows(ptrs=v_ptrs, mask=row_mask, split_stride=v_split_stride)
        gate_tile = load_weights(from_column(gate_weights, start), TILE)  # [R, N]
        up_tile = load_weights(from_column(up_weights, start), TILE)
        wait_for_previous(DEPENDENT)
        dtype = gate_tile.dtype
        first_rank = tl.cast(0, tl.int32)
        gate_shrunk = shrunk_tile(gate_v, first_rank, gate_rank, DOT_BLOCK_R, NUM_SPLITS, dtype)
        up_shrunk = shrunk_tile(up_v, first_rank, up_rank, DOT_BLOCK_R, NUM_SPLITS, dtype)
        for n in range(start, BLOCK_N, step):
            columns = (n + tl.arange(0, DOT_BLOCK_N))[None, :]
            mask = row_mask & (columns < num_columns)
            gate_ptrs = gate_up_ptr + rows * gate_up_stride + columns
            gate = tl.load(gate_ptrs, mask=mask, other=0.0)  # [T, N]
            up = tl.load(gate_ptrs + INTERMEDIATE, mask=mask, other=0.0)
            has_next = n + step < BLOCK_N
            gate_turn = from_column(gate_weights, n)
            up_turn = from_column(up_weights, n)
            next_gate_tile = load_weights(from_column(gate_turn, step, is_used=has_next), TILE)
            next_up_tile = load_weights(from_column(up_turn, step, is_used=has_next), TILE)
            gate_delta = tile_delta(gate_tile, gate_shrunk, gate_turn, gate_v, TILE, NUM_SPLITS)
            gate = _changed(gate, gate_delta, gate_scaling, gate_rank)
            up_delta = tile_delta(up_tile, up_shrunk, up_turn, up_v, TILE, NUM_SPLITS)
            up = _changed(up, up_delta, up_scaling, up_rank)
            tl.store(y_ptr + rows * INTERMEDIATE + columns, silu_product(gate, up), mask=mask)
            gate_tile = next_gate_tile
            up_tile = next_up_tile


@triton.jit
def _changed(base, delta, scaling, rank):
    """base + scaling * delta rounded to base's dtype; base's own bits where there is no delta."""
    changed = (base.to(tl.float32) + scaling * delta).to(base.dtype)
    return tl.where(rank > 0, changed, base)
