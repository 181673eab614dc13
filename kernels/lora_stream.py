"""Tiles of an adapter's weights in the pool, for the programs of the LoRA kernels.

A layer's stream is cut into pages that may lie anywhere, so a row of weights may go on elsewhere
in its middle. A row of a tile is so short that it meets two pages at most: the ids of both are
looked up once, and each element goes by the one it is on.
"""

from typing import NamedTuple

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


class TileShape(NamedTuple):
    """Constants of a tile of weights."""

    ROWS: int
    # At most PAGE_ELEMS.
    COLUMNS: int
    PAGE_ELEMS: int
    # No row of weights has more, its padding included.
    MAX_ROW_ELEMS: int


@triton.constexpr_function
def tile_shape(rows, columns, page_elems, max_row_elems):
    return TileShape(rows, columns, page_elems, max_row_elems)


# Kernels make the tuples below, and those of `lora_delta` and `paged_tile`, of their arguments,
# which Triton would specialise otherwise if they came as tuples. Constants are not among the
# fields: a tuple that is assigned to a name has tensors in their places.
class Stream(NamedTuple):
    """One layer of an adapter: element e lies at pool_ptr + e + the shift of the page it is on."""

    pool_ptr: tl.tensor
    # The adapter's page table; no more is read of it than a tile needs.
    table_ptr: tl.tensor
    page_stride: tl.tensor


class Weights(NamedTuple):
    """A matrix in a stream, or what a program reads of it."""

    stream: Stream
    # The stream's element in row 0, column 0.
    first: tl.tensor
    # From one row to the next.
    row_elems: tl.tensor
    num_rows: tl.tensor
    num_columns: tl.tensor


class TilePages(NamedTuple):
    """Where a tile's elements lie: those before `boundary` have `shift`, others `next_shift`.

    Scalars, or [ROWS, 1] of each of the tile's rows.
    """

    boundary: tl.tensor
    shift: tl.tensor
    next_shift: tl.tensor


@triton.jit
def pick(VALUES: tl.constexpr, index, NUM_VALUES: tl.constexpr):
    """VALUES[index], of a constant tuple by an index known at run time."""
    value = VALUES[0]
    for i in tl.static_range(1, NUM_VALUES):
        value = tl.where(index == i, VALUES[i], value)
    return value


@triton.jit
def from_row(weights, row):
    """The `Weights` from a row on."""
    return Weights(
        stream=weights.stream,
        first=weights.first + row * weights.row_elems,
        row_elems=weights.row_elems,
        num_rows=weights.num_rows - row,
        num_columns=weights.num_columns,
    )


@triton.jit
def from_column(weights, column, is_used=True):
    """The `Weights` from a column on, or none of them."""
    return Weights(
        stream=weights.stream,
        first=weights.first + column,
        row_elems=weights.row_elems,
        num_rows=tl.where(is_used, weights.num_rows, 0),
        num_columns=weights.num_columns - column,
    )


@triton.jit
def find_pages(weights, TILE: tl.constexpr):
    """The `TilePages` of the first tile of `Weights`."""
    first = weights.first
    row_elems = weights.row_elems
    num_rows = weights.num_rows
    num_columns = tl.minimum(weights.num_columns, TILE.COLUMNS)
    if (TILE.ROWS - 1) * TILE.MAX_ROW_ELEMS + TILE.COLUMNS <= TILE.PAGE_ELEMS:
        # The rows together meet two pages: scalars do, which cost a load for all.
        page = first // TILE.PAGE_ELEMS
        is_used = (num_rows > 0) & (num_columns > 0)
        end = first + (tl.minimum(num_rows, TILE.ROWS) - 1) * row_elems + num_columns
    else:
        rows = tl.arange(0, TILE.ROWS)[:, None]
        starts = first + rows * row_elems
        page = starts // TILE.PAGE_ELEMS
        is_used = (rows < num_rows) & (num_columns > 0)
        end = starts + num_columns
    boundary = (page + 1) * TILE.PAGE_ELEMS
    stream = weights.stream
    page_id = tl.load(stream.table_ptr + page, mask=is_used, other=0).to(tl.int64)
    is_split = is_used & (end > boundary)
    next_id = tl.load(stream.table_ptr + page + 1, mask=is_split, other=0).to(tl.int64)
    return TilePages(
        boundary=boundary,
        shift=page_id * stream.page_stride - page * TILE.PAGE_ELEMS,
        next_shift=next_id * stream.page_stride - boundary,
    )


@triton.jit
def load_on_pages(weights, pages, TILE: tl.constexpr):
    """`load_weights` of a tile that lies in the one of which `pages` are."""
    rows = tl.arange(0, TILE.ROWS)[:, None]
    columns = tl.arange(0, TILE.COLUMNS)[None, :]
    elements = weights.first + rows * weights.row_elems + columns
    offsets = tl.where(elements < pages.boundary, pages.shift, pages.next_shift) + elements
    # Rows, tiles and pages begin at multiples of 64 elements, so runs of 64 lie together.
    offsets = tl.multiple_of(tl.max_contiguous(offsets, [1, 64]), [1, 64])
    mask = (rows < weights.num_rows) & (columns < weights.num_columns)
    return tl.load(weights.stream.pool_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def load_weights(weights, TILE: tl.constexpr):
    """[ROWS, COLUMNS]: the first tile of `Weights`, 0 beyond their end."""
    return load_on_pages(weights, find_pages(weights, TILE), TILE)
