"""How the LoRA kernels are cut into programs and compiled, as functions of shapes alone.

Choices are by measurement on an H100. Everything that a choice depends on is known when a CUDA
graph is captured; contents of tensors are not.
"""

from dataclasses import dataclass, replace
from typing import Self

from kernels.row_alignment import row_elems

# Tiles of up to this many rows are for decoding: most hold a single row.
MAX_DECODE_BLOCK_ROWS = 32
# Programs that keep a large GPU busy: two a multiprocessor.
BUSY_PROGRAMS = 264
MAX_SPLITS = 16
# Elements of A that a program multiplies with a single row at once: 64 for each of 128 threads.
ROW_TILE_ELEMS = 8192


@dataclass(frozen=True)
class ShrinkLaunch:
    """Tile sizes of `lora_shrink`, powers of two but for `num_splits`."""

    # Parts of in_features, at most; programs of their own.
    num_splits: int
    # Ranks of a program.
    block_r: int
    # Columns at a time for a tile of a single row, and for the matrix unit.
    row_block_k: int
    dot_block_k: int
    num_warps: int
    # Of the loop over columns for the matrix unit.
    num_stages: int

    def fit(self, in_features: int, page_elems: int) -> Self:
        """The same with tiles that meet two pages at most and are not mostly empty."""
        limit = _tile_limit(in_features, page_elems)
        return replace(
            self,
            row_block_k=min(self.row_block_k, limit),
            dot_block_k=min(self.dot_block_k, limit),
        )

    def split_k(self, in_features: int) -> int:
        """Columns of one part: whole tiles."""
        step = max(self.row_block_k, self.dot_block_k)
        return _round_up(-(-in_features // self.num_splits), step)

    def chunk_k(self, split_k: int, page_elems: int) -> int:
        """Columns for which the matrix unit's loop finds pages once: a part, or a divisor of it."""
        step = self.dot_block_k
        sizes = range(step, min(split_k, page_elems) + 1, step)
        return max(size for size in sizes if split_k % size == 0)


@dataclass(frozen=True)
class ExpandLaunch:
    """Tile sizes of `lora_expand` and of `lora_silu_mul`, powers of two."""

    # Columns of a program, and of those for the matrix unit at a time.
    block_n: int
    dot_block_n: int
    # Ranks at a time for a tile of a single row, and for the matrix unit.
    row_block_r: int
    dot_block_r: int
    num_warps: int

    def fit(self, max_width: int, page_elems: int) -> Self:
        """The same with tiles that meet two pages at most and are not mostly empty."""
        limit = _tile_limit(max_width, page_elems)
        block_n = min(self.block_n, limit)
        return replace(self, block_n=block_n, dot_block_n=min(self.dot_block_n, block_n))


def shrink_launch(
    num_rows: int,
    block_rows: int,
    num_modules: int,
    max_rank: int,
    in_features: int,
    itemsize: int = 2,
) -> ShrinkLaunch:
    """What `lora_shrink` uses for these shapes; `itemsize` is of an element of the weights."""
    block_r = max(16, min(64, _power_of_two_from(max_rank)))
    if block_rows <= MAX_DECODE_BLOCK_ROWS:
        # Small programs without loops: what counts is how many loads are under way.
        block_r = 16 if max_rank <= 64 else 32
        row_block_k = 512 if num_rows > 16 else 256
        return ShrinkLaunch(
            num_splits=min(MAX_SPLITS, -(-in_features // row_block_k)),
            block_r=block_r,
            row_block_k=row_block_k * 16 // block_r,
            dot_block_k=128 * 2 // itemsize,
            num_warps=4 if num_rows > 16 else 2,
            num_stages=3,
        )
    programs = -(-num_rows // block_rows) * num_modules * -(-max_rank // block_r)
    return ShrinkLaunch(
        num_splits=min(8, _power_of_two_from(-(-BUSY_PROGRAMS // max(1, programs)))),
        block_r=block_r,
        row_block_k=ROW_TILE_ELEMS // block_r,
        dot_block_k=(128 if block_r <= 32 else 64) * 2 // itemsize,
        num_warps=4,
        num_stages=3,
    )


def expand_launch(block_rows: int, max_rank: int, itemsize: int = 2) -> ExpandLaunch:
    """What `lora_expand` uses for these shapes; `itemsize` is of an element of the weights."""
    if block_rows <= MAX_DECODE_BLOCK_ROWS:
        return ExpandLaunch(
            block_n=1024,
            dot_block_n=128 * 2 // itemsize,
            row_block_r=8 if max_rank <= 16 else 16,
            dot_block_r=16,
            num_warps=4,
        )
    return ExpandLaunch(
        block_n=512,
        dot_block_n=64 * 2 // itemsize,
        row_block_r=8,
        dot_block_r=max(16, min(64, _power_of_two_from(max_rank))),
        num_warps=4,
    )


def lora_silu_launch(block_rows: int, max_rank: int, itemsize: int = 2) -> ExpandLaunch:
    """What `lora_silu_mul` uses for these shapes; `itemsize` is of an element of the weights."""
    launch = expand_launch(block_rows, max_rank, itemsize)
    # Two tiles of weights: columns in decodes are fewer, so that more programs are at work.
    dot_block_n = 64 if block_rows <= MAX_DECODE_BLOCK_ROWS else 128
    return replace(launch, block_n=1024, dot_block_n=dot_block_n * 2 // itemsize)


def _tile_limit(features: int, page_elems: int) -> int:
    """Columns of the widest tile of rows of `features` that is of use."""
    page_limit = 1 << (page_elems.bit_length() - 1)
    return min(page_limit, _power_of_two_from(row_elems(features)))


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _power_of_two_from(value: int) -> int:
    """The least power of two that is `value` or more."""
    return 1 << (value - 1).bit_length()
