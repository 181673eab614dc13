"""Arguments shared by `lora_shrink` and `lora_expand`: which rows use which adapter, and where.

The batch builder makes one `LoraSegments` a step; kernels only read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True)
class LoraTiles:
    """Segments cut into tiles of at most `block_rows` rows of one adapter: a program each.

    Rows [row_starts[i], row_ends[i]) use slot `slots[i]`; slot -1 is an unused entry, so that a
    batch of any composition fits tensors of one size.
    """

    # int32 [num_tiles] each.
    slots: torch.Tensor
    row_starts: torch.Tensor
    row_ends: torch.Tensor
    # 16, 32, 64 or 128.
    block_rows: int


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
    # What Triton kernels loop over instead of the segments; None where no such kernel runs.
    tiles: LoraTiles | None = None

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


def plan_tiles(
    seg_indptr: Sequence[int], seg_slots: Sequence[int], block_rows: int
) -> list[tuple[int, int, int]]:
    """(slot, first row, end row) of each tile of `LoraTiles`; rows of the base model have none."""
    return [
        (slot, row, min(row + block_rows, seg_indptr[s + 1]))
        for s, slot in enumerate(seg_slots)
        if slot >= 0
        for row in range(seg_indptr[s], seg_indptr[s + 1], block_rows)
    ]
