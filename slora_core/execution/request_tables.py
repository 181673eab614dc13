"""What the device keeps of each running request from step to step, by `table_idx`.

The last sampled token, so that the next step can start before the host has read it, and the block
table, so that a step sends only the page ids that are new. Owned by the model runner; what is sent
when is decided by `SentPages` on the host.
"""

import torch


class RequestTables:
    """Args:
    max_pages: pages of the longest request, as of `SentPages`.
    """

    def __init__(self, num_requests: int, max_pages: int, device: torch.device) -> None:
        self.last_tokens = torch.zeros(num_requests, dtype=torch.int32, device=device)
        # One more than there are requests: padding writes there.
        self._tables = torch.zeros(num_requests + 1, max_pages, dtype=torch.int32, device=device)

    def write_pages(self, entries: torch.Tensor, page_ids: torch.Tensor) -> None:
        """Write what `SentPages.new_pages` returned, as int32 device tensors of one length."""
        self._tables.view(-1)[entries] = page_ids

    def write_last_tokens(self, table_idxs: torch.Tensor, tokens: torch.Tensor) -> None:
        """Keep the tokens just sampled, int32, for these requests (int32)."""
        self.last_tokens[table_idxs] = tokens

    def block_tables(self, table_idxs: torch.Tensor) -> torch.Tensor:
        """int32 [requests, max_pages]; entries past a request's pages are stale, yet valid ids."""
        return self._tables.index_select(0, table_idxs)
