"""The pool's adapter pages as kernels see them: copies into the pool, tables of resident slots.

Owned by the model runner; told by `AdapterLoad`s what to copy. Decides nothing.
"""

import torch

from slora_core.adapters.page_layout import PackedAdapter


class AdapterTables:
    """Page tables, offsets and scaling of every adapter slot, on the pool's device.

    The tensors keep their addresses, so CUDA graphs may read them.

    Args:
        num_modules: LoRA modules of the model.
        max_pages: pages of the largest adapter that can be loaded.
    """

    def __init__(
        self, pool: torch.Tensor, num_modules: int, max_slots: int, max_pages: int
    ) -> None:
        num_layers = pool.shape[1]
        device = pool.device
        self._pool = pool
        # Copies of adapters overlap with steps that do not use them.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.page_tables = torch.zeros(max_slots, max_pages, dtype=torch.int32, device=device)
        self.offsets = torch.zeros(
            max_slots, num_layers, num_modules, 3, dtype=torch.int32, device=device
        )
        self.scaling = torch.zeros(max_slots, num_layers, num_modules, device=device)

    def load(self, slot: int, adapter: PackedAdapter, page_ids: list[int]) -> None:
        """Copy the adapter's pages to `page_ids` of the pool and fill its slot.

        On CUDA the copy runs beside the steps launched before, none of which may use the pages;
        steps launched after it wait for it on the device.
        """
        layout = adapter.layout
        assert len(page_ids) == layout.num_pages
        table = torch.tensor(page_ids, dtype=torch.int32)
        if self._copies is None:
            self._copy_pages(adapter.pages, page_ids)
        else:
            with torch.cuda.stream(self._copies):
                self._copy_pages(adapter.pages, page_ids)
            torch.cuda.current_stream(self._pool.device).wait_stream(self._copies)
        for entry, values in (
            (self.page_tables[slot, : layout.num_pages], table),
            (self.offsets[slot], layout.offsets),
            (self.scaling[slot], layout.scaling),
        ):
            # On the stream of the steps: those launched before still read the slot's old values.
            entry.copy_(values if self._copies is None else values.pin_memory(), non_blocking=True)

    def _copy_pages(self, pages: torch.Tensor, page_ids: list[int]) -> None:
        for start, end in _contiguous_runs(page_ids):
            first = page_ids[start]
            target = self._pool[first : first + end - start]
            target.copy_(pages[start:end], non_blocking=True)


def _contiguous_runs(page_ids: list[int]) -> list[tuple[int, int]]:
    """[start, end) index ranges of `page_ids` whose ids follow one another, to copy as one."""
    runs = []
    start = 0
    for i in range(1, len(page_ids) + 1):
        if i == len(page_ids) or page_ids[i] != page_ids[i - 1] + 1:
            runs.append((start, i))
            start = i
    return runs
