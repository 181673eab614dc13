"""Block tables on the device follow the requests, and only new page ids are sent."""

import torch

from slora_core.execution.request_tables import RequestTables
from slora_core.execution.sent_pages import SentPages
from slora_core.requests import Request, RequestState, SamplingParams, ScheduledChunk

CPU = torch.device("cpu")


class Tables:
    """Both sides: what was sent, and what it came to."""

    def __init__(self, num_requests: int, max_pages: int) -> None:
        self.sent = SentPages(num_requests, max_pages)
        self.tables = RequestTables(num_requests, max_pages, CPU)

    def send(self, *requests: RequestState) -> int:
        """Send what a step of these requests sends; returns the number of page ids."""
        chunks = [ScheduledChunk(request, 0, 1, True, False, -1) for request in requests]
        num_new = self.sent.num_new_pages(chunks)
        entries, page_ids = self.sent.new_pages(chunks)
        self.tables.write_pages(torch.tensor(entries).int(), torch.tensor(page_ids).int())
        assert num_new == len(entries) == len(page_ids)
        return len(entries)

    def of(self, request: RequestState) -> list[int]:
        table = self.tables.block_tables(torch.tensor([request.table_idx]))[0]
        return table[: len(request.page_ids)].tolist()


def _request(table_idx: int, pages: list[int]) -> RequestState:
    request = Request([1, 2], SamplingParams(), request_id="same id")
    return RequestState(request, table_idx=table_idx, page_ids=pages)


def test_only_new_pages_are_sent() -> None:
    tables = Tables(3, 4)
    first, second = _request(0, [7, 5]), _request(2, [1])
    assert tables.send(first, second) == 3
    first.page_ids.append(9)
    assert tables.send(first, second) == 1
    assert tables.send(first, second) == 0
    assert (tables.of(first), tables.of(second)) == ([7, 5, 9], [1])


def test_a_place_taken_over_is_sent_anew() -> None:
    tables = Tables(1, 4)
    tables.send(_request(0, [7, 5, 3]))
    other = _request(0, [2, 4])
    assert tables.send(other) == 2
    assert tables.of(other) == [2, 4]


def test_a_preempted_request_is_sent_anew() -> None:
    tables = Tables(1, 4)
    request = _request(0, [7, 5])
    tables.send(request)
    request.page_ids, request.num_preemptions = [6, 8], 1
    assert tables.send(request) == 2
    assert tables.of(request) == [6, 8]


def test_padding_is_written_where_no_request_reads() -> None:
    tables = Tables(2, 4)
    requests = [_request(0, [1, 2, 3, 4]), _request(1, [5, 6, 7, 8])]
    tables.send(*requests)
    padding = torch.tensor([tables.sent.padding_entry] * 3)
    tables.tables.write_pages(padding, torch.tensor([9, 9, 9]).int())
    assert [tables.of(request) for request in requests] == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_place_keeps_its_last_token() -> None:
    tables = RequestTables(3, 4, CPU)
    tables.write_last_tokens(torch.tensor([2, 0]).int(), torch.tensor([7, 8]).int())
    tables.write_last_tokens(torch.tensor([2]).int(), torch.tensor([9]).int())
    assert tables.last_tokens.tolist() == [8, 0, 9]
