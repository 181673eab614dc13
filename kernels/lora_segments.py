"""Arguments that the LoRA ops share: which rows use which adapter, and where its weights lie.

The model runner makes one `LoraSegments` a step; kernels only read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import torch


@dataclass(frozen=True)
class HostSegment:
    """One non-empty run of rows that use an adapter, and the adapter's tables as plain numbers."""

    start: int
    end: int
    page_ids: list[int]
    # [layer][module]: rank, offset of A, offset of B.
    offsets: list[list[list[int]]]
    # [layer][module]
    scaling: list[list[float]]


# Rows of a tile for decoding: what one matrix instruction takes at least.
DECODE_BLOCK_ROWS = 16
PROMPT_BLOCK_ROWS = 64
# Runs of fewer rows are cut into tiles of one: these read the weights again, from the L2 cache, in
# less time than it takes the matrix unit's loop over columns, which is made for many rows.
MIN_DECODE_RUN = 48
# The same of prompts' runs, and of what is left of a run after its whole tiles.
MIN_DOT_ROWS = 16
# Entries that a tile of many rows is shared by.
NUM_SHARES = 8
# With so many large tiles there are programs enough without shares.
MANY_TILES = 64


class Tile(NamedTuple):
    """Rows [row_start, row_end) of the adapter in `slot`, or one share of their work.

    Share s of `num_shares` computes every num_shares-th run of columns of outputs, from the s-th
    on; share 0 computes `lora_shrink` alone.
    """

    slot: int
    row_start: int
    row_end: int
    share: int = 0
    num_shares: int = 1


# An entry of which nothing is computed, because it has no rows.
UNUSED_TILE = Tile(-1, 0, 0)


@dataclass(frozen=True)
class LoraTiles:
    """Segments cut into tiles of at most `block_rows` rows of one adapter: a program an entry.

    Fields are those of `Tile`. With unused entries, a batch of any composition fits tensors of one
    size: there are never more entries than rows.
    """

    # int32 [num_tiles] each.
    slots: torch.Tensor
    row_starts: torch.Tensor
    row_ends: torch.Tensor
    shares: torch.Tensor
    num_shares: torch.Tensor
    # 16, 32, 64 or 128.
    block_rows: int

    @classmethod
    def of(
        cls,
        tiles: Sequence[Tile],
        block_rows: int,
        num_tiles: int | None = None,
        device: torch.device | None = None,
    ) -> Self:
        """Tensors of what `plan_tiles` gave, with unused entries up to `num_tiles`."""
        padding = [UNUSED_TILE] * (0 if num_tiles is None else num_tiles - len(tiles))
        table = torch.tensor([*tiles, *padding], dtype=torch.int32).view(-1, len(Tile._fields))
        slots, row_starts, row_ends, shares, num_shares = table.T.contiguous().to(device)
        return cls(slots, row_starts, row_ends, shares, num_shares, block_rows)

    def to(self, device: torch.device) -> Self:
        return replace(self, **{name: getattr(self, name).to(device) for name in TILE_FIELDS})


# Names of the tensors of `LoraTiles`, in the order of `Tile`.
TILE_FIELDS = ("slots", "row_starts", "row_ends", "shares", "num_shares")


@dataclass(frozen=True)
class LoraSegments:
    """Runs of rows of one adapter, and the device-resident tables of all resident adapters.

    Rows [seg_indptr[s], seg_indptr[s + 1]) of a batch use the adapter in slot `seg_slots[s]`;
    slot -1 is the base model. Element `o` of layer `l` of slot `s` lies at
    `pool[page_tables[s, o // page_elems], l, o % page_elems]`.
    """

    # int32 [S + 1], rows; seg_indptr[0] == 0 and seg_indptr[S] is the number of rows.
    seg_indptr: torch.Tensor
    # int32 [S]
    seg_slots: torch.Tensor
    # int32 [num_slots, max_pages]
    page_tables: torch.Tensor
    # int32 [num_slots, num_layers, num_modules, 3]: rank (0: absent), offset of A, offset of B.
    offsets: torch.Tensor
    # float32 [num_slots, num_layers, num_modules]: alpha / r, or alpha / sqrt(r) for rsLoRA.
    scaling: torch.Tensor
    # At least the largest rank of any adapter in `seg_slots`.
    max_rank: int
    # At least the modules of any adapter in `seg_slots`: others need no launch.
    modules: frozenset[int]
    # What Triton kernels loop over instead of the segments; None where no such kernel runs.
    tiles: LoraTiles | None = None

    def to(self, device: torch.device) -> Self:
        return replace(
            self,
            seg_indptr=self.seg_indptr.to(device),
            seg_slots=self.seg_slots.to(device),
            page_tables=self.page_tables.to(device),
            offsets=self.offsets.to(device),
            scaling=self.scaling.to(device),
            tiles=self.tiles and self.tiles.to(device),
        )

    @cached_property
    def on_host(self) -> list[HostSegment]:
        """The segments with an adapter, for implementations that loop over them; read once."""
        bounds = self.seg_indptr.tolist()
        return [
            HostSegment(
                start=bounds[s],
                end=bounds[s + 1],
                page_ids=self.page_tables[slot].tolist(),
                offsets=self.offsets[slot].tolist(),
                scaling=self.scaling[slot].tolist(),
            )
            for s, slot in enumerate(self.seg_slots.tolist())
            if slot >= 0 and bounds[s + 1] > bounds[s]
        ]


def plan_tiles(seg_indptr: Sequence[int], seg_slots: Sequence[int], block_rows: int) -> list[Tile]:
    """Segments cut into tiles.

    Short runs become tiles of one row. Others are cut into shares, so that a few tiles of many
    rows keep a GPU as busy as many tiles of one. Rows of the base model have tiles too, of slot
    -1: kernels that write every row need them.
    """
    min_run = MIN_DECODE_RUN if block_rows == DECODE_BLOCK_ROWS else MIN_DOT_ROWS
    tiles: list[Tile] = []
    for s, slot in enumerate(seg_slots):
        start, end = seg_indptr[s], seg_indptr[s + 1]
        if end - start >= min_run:
            left = (end - start) % block_rows
            whole_end = end - left if left < MIN_DOT_ROWS else end
            tiles += [
                Tile(slot, row, min(row + block_rows, end))
                for row in range(start, whole_end, block_rows)
            ]
            start = whole_end
        tiles += [Tile(slot, row, row + 1) for row in range(start, end)]
    if block_rows >= PROMPT_BLOCK_ROWS and sum(map(_is_large, tiles)) >= MANY_TILES:
        return tiles
    return [share for tile in tiles for share in _shares(tile)]


def _is_large(tile: Tile) -> bool:
    return tile.row_end - tile.row_start >= MIN_DOT_ROWS


def _shares(tile: Tile) -> list[Tile]:
    if not _is_large(tile):
        return [tile]
    return [tile._replace(share=share, num_shares=NUM_SHARES) for share in range(NUM_SHARES)]


def choose_block_rows(num_rows: int, num_segments: int) -> int:
    """Rows of a tile for a batch of `num_rows` rows in `num_segments` runs of one adapter.

    Small tiles for decoding, where segments of a row or two share nothing, and large ones for
    prompts, where a tile reads its adapter's weights once for all its rows.
    """
    few = num_rows <= 32 * max(1, num_segments)
    return DECODE_BLOCK_ROWS if few else PROMPT_BLOCK_ROWS
