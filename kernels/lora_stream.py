"""Tiles of an adapter's weights in the pool, for the programs of the LoRA kernels.

A layer's stream is cut into pages that may lie anywhere, so a row of weights may go on elsewhere
in its middle. A row of a tile is so short that it meets two pages at most: the ids of both are
looked up once, and each element goes by the one it is on.
"""

import triton
import triton.language as tl

# Arguments whose alignment varies by layer and step: nothing may be compiled anew while serving.
VARYING_POINTERS = [
    "page_tables_ptr",
    "offsets_ptr",
    "scaling_ptr",
    "tile_slots_ptr",
    "tile_starts_ptr",
    "tile_ends_ptr",
    "tile_shares_ptr",
    "tile_num_shares_ptr",
]


@triton.jit
def pick(VALUES: tl.constexpr, index, NUM_VALUES: tl.constexpr):
    """VALUES[index], of a constant tuple by an index known at run time."""
    value = VALUES[0]
    for i in tl.static_range(1, NUM_VALUES):
        value = tl.where(index == i, VALUES[i], value)
    return value


@triton.jit
def find_pages(
    table_ptr,
    first,
    row_elems,
    num_rows,
    num_columns,
    page_stride,
    PAGE_ELEMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAX_ROW_ELEMS: tl.constexpr,
):
    """Where a tile's elements lie: element e of the stream is at pool_ptr + e + its page's shift.

    Returns (boundary, shift, next_shift), scalars or [ROWS, 1]: elements e < boundary have
    `shift`, the others `next_shift`.

    Args:
        table_ptr: the adapter's page table; no more is read of it than the tile needs.
        first: the stream's element in row 0, column 0 of the tile.
        row_elems: from one row to the next, at most MAX_ROW_ELEMS.
        num_rows, num_columns: what is used of the tile; may exceed it.
        COLUMNS: at most PAGE_ELEMS.
    """
    num_columns = tl.minimum(num_columns, COLUMNS)
    if (ROWS - 1) * MAX_ROW_ELEMS + COLUMNS <= PAGE_ELEMS:
        # The rows together meet two pages: scalars do, which cost a load for all.
        page = first // PAGE_ELEMS
        is_used = (num_rows > 0) & (num_columns > 0)
        end = first + (tl.minimum(num_rows, ROWS) - 1) * row_elems + num_columns
    else:
        rows = tl.arange(0, ROWS)[:, None]
        starts = first + rows * row_elems
        page = starts // PAGE_ELEMS
        is_used = (rows < num_rows) & (num_columns > 0)
        end = starts + num_columns
    boundary = (page + 1) * PAGE_ELEMS
    page_id = tl.load(table_ptr + page, mask=is_used, other=0).to(tl.int64)
    is_split = is_used & (end > boundary)
    next_id = tl.load(table_ptr + page + 1, mask=is_split, other=0).to(tl.int64)
    return boundary, page_id * page_stride - page * PAGE_ELEMS, next_id * page_stride - boundary


@triton.jit
def load_on_pages(
    pool_ptr,
    boundary,
    shift,
    next_shift,
    first,
    row_elems,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[ROWS, COLUMNS] weights of a tile inside one of `find_pages`; 0 beyond what is used."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    elements = first + rows * row_elems + columns
    offsets = tl.where(elements < boundary, shift, next_shift) + elements
    # Rows, tiles and pages begin at multiples of 64 elements, so runs of 64 lie together.
    offsets = tl.multiple_of(tl.max_contiguous(offsets, [1, 64]), [1, 64])
    mask = (rows < num_rows) & (columns < num_columns)
    return tl.load(pool_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def load_weights(
    pool_ptr,
    table_ptr,
    first,
    row_elems,
    num_rows,
    num_columns,
    page_stride,
    PAGE_ELEMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAX_ROW_ELEMS: tl.constexpr,
):
    """[ROWS, COLUMNS] weights of a tile of the stream; arguments as in `find_pages`."""
    boundary, shift, next_shift = find_pages(
        table_ptr,
        first,
        row_elems,
        num_rows,
        num_columns,
        page_stride,
        PAGE_ELEMS,
        ROWS,
        COLUMNS,
        MAX_ROW_ELEMS,
    )
    return load_on_pages(
        pool_ptr,
        boundary,
        shift,
        next_shift,
        first,
        row_elems,
        num_rows,
        num_columns,
        ROWS,
        COLUMNS,
    )
