"""What the device keeps of each running request from step to step, by `Request.row`.

The last sampled token, so that the next step can start before the host has read it, and the block
table, so that a step sends only the page ids that are new. Owned by the model runner.
"""

from collections.abc import Sequence

import torch

from slora_core.requests import Request, ScheduledChunk


class RowState:
    def __init__(self, num_rows: int, max_pages: int, device: torch.device) -> None:
        self.num_rows = num_rows
        self.last_tokens = torch.zeros(num_rows, dtype=torch.int32, device=device)
        # One row more than there are requests: padding writes there.
        self._tables = torch.zeros(num_rows + 1, max_pages, dtype=torch.int32, device=device)
        self._max_pages = max_pages
        # Of each row: its request, how often that was preempted, and the page ids it has sent.
        self._sent: list[tuple[Request | None, int, int]] = [(None, 0, 0)] * num_rows

    @property
    def padding_entry(self) -> int:
        """An entry of the tables that nobody reads."""
        return self._tables.numel() - 1

    def num_new_pages(self, chunks: Sequence[ScheduledChunk]) -> int:
        """How many `new_pages` would return; each request has one chunk."""
        return sum(len(chunk.request.page_ids) - self._num_sent(chunk.request) for chunk in chunks)

    def new_pages(self, chunks: Sequence[ScheduledChunk]) -> tuple[list[int], list[int]]:
        """Entries of the tables that the step's block tables add, and their page ids."""
        entries: list[int] = []
        page_ids: list[int] = []
        for chunk in chunks:
            request = chunk.request
            num_sent = self._num_sent(request)
            num_pages = len(request.page_ids)
            if num_sent < num_pages:
                first = chunk.request.row * self._max_pages
                entries += range(first + num_sent, first + num_pages)
                page_ids += request.page_ids[num_sent:]
            self._sent[chunk.request.row] = (request, request.num_preemptions, num_pages)
        return entries, page_ids

    def _num_sent(self, request: Request) -> int:
        owner, preemptions, num_sent = self._sent[request.row]
        same = owner is request and preemptions == request.num_preemptions
        return num_sent if same else 0

    def write_pages(self, entries: torch.Tensor, page_ids: torch.Tensor) -> None:
        """Write what `new_pages` returned, as int32 device tensors of one length."""
        self._tables.view(-1)[entries] = page_ids

    def write_last_tokens(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Keep the tokens just sampled, int32, for these rows (int32)."""
        self.last_tokens[rows] = tokens

    def block_tables(self, rows: torch.Tensor) -> torch.Tensor:
        """int32 [len(rows), max_pages]; entries past a request's pages are stale, yet valid ids."""
        return self._tables.index_select(0, rows)
