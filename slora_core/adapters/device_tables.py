"""The pool's adapter pages as kernels see them: copies into the pool, tables of resident slots.

Owned by the model runner; told by `AdapterLoad`s what to copy. Decides nothing.
"""

import torch

from slora_core.adapters.page_layout import PackedAdapter
from slora_core.config import LORA_MODULES


class DeviceAdapterTables:
    """Page tables, offsets and scaling of every adapter slot, on the pool's device."""

    def __init__(self, pool: torch.Tensor, max_slots: int) -> None:
        num_pages, num_layers, _ = pool.shape
        num_modules = len(LORA_MODULES)
        device = pool.device
        self._pool = pool
        # Grown to the widest adapter seen: a table of num_pages columns would be mostly empty.
        self.page_tables = torch.zeros(max_slots, 1, dtype=torch.int32, device=device)
        self.offsets = torch.zeros(
            max_slots, num_layers, num_modules, 3, dtype=torch.int32, device=device
        )
        self.scaling = torch.zeros(max_slots, num_layers, num_modules, device=device)
        # Host side: the batch builder needs it to size a step's intermediates.
        self.max_ranks = [0] * max_slots

    def load(self, slot: int, adapter: PackedAdapter, page_ids: list[int]) -> None:
        """Copy the adapter's pages to `page_ids` of the pool and fill its slot."""
        layout = adapter.layout
        assert len(page_ids) == layout.num_pages
        for start, end in _contiguous_runs(page_ids):
            first = page_ids[start]
            self._pool[first : first + end - start].copy_(adapter.pages[start:end])
        if layout.num_pages > self.page_tables.shape[1]:
            grown = self.page_tables.new_zeros(self.page_tables.shape[0], layout.num_pages)
            grown[:, : self.page_tables.shape[1]] = self.page_tables
            self.page_tables = grown
        self.page_tables[slot, : layout.num_pages] = torch.tensor(page_ids, dtype=torch.int32)
        self.offsets[slot] = layout.offsets
        self.scaling[slot] = layout.scaling
        self.max_ranks[slot] = layout.max_rank


def _contiguous_runs(page_ids: list[int]) -> list[tuple[int, int]]:
    """[start, end) index ranges of `page_ids` whose ids follow one another, to copy as one."""
    runs = []
    start = 0
    for i in range(1, len(page_ids) + 1):
        if i == len(page_ids) or page_ids[i] != page_ids[i - 1] + 1:
            runs.append((start, i))
            start = i
    return runs
