"""Which page ids of each running request the devices have: a step sends only the new ones."""

from collections.abc import Sequence

from slora_core.requests import RequestState, ScheduledChunk


class SentPages:
    """Entries of block tables, flat: page p of a request is at table_idx * max_pages + p.

    Args:
        max_pages: pages of the longest request.
    """

    def __init__(self, num_requests: int, max_pages: int) -> None:
        self._max_pages = max_pages
        # Of each table index: its request, how often that was preempted, and its pages sent.
        self._sent: list[tuple[RequestState | None, int, int]] = [(None, 0, 0)] * num_requests
        # An entry that nobody reads.
        self.padding_entry = (num_requests + 1) * max_pages - 1

    def num_new_pages(self, chunks: Sequence[ScheduledChunk]) -> int:
        """How many `new_pages` would return; each request has one chunk."""
        return sum(len(chunk.request.page_ids) - self._num_sent(chunk.request) for chunk in chunks)

    def new_pages(self, chunks: Sequence[ScheduledChunk]) -> tuple[list[int], list[int]]:
        """Entries that the step's block tables add, and their page ids; they count as sent."""
        entries: list[int] = []
        page_ids: list[int] = []
        for chunk in chunks:
            request = chunk.request
            num_sent = self._num_sent(request)
            num_pages = len(request.page_ids)
            if num_sent < num_pages:
                first = request.table_idx * self._max_pages
                entries += range(first + num_sent, first + num_pages)
                page_ids += request.page_ids[num_sent:]
            self._sent[request.table_idx] = (request, request.num_preemptions, num_pages)
        return entries, page_ids

    def _num_sent(self, request: RequestState) -> int:
        owner, preemptions, num_sent = self._sent[request.table_idx]
        same = owner is request and preemptions == request.num_preemptions
        return num_sent if same else 0
