"""Block tables on the device follow the requests, and only new page ids are sent."""

import torch

from slora_core.execution.row_state import RowState
from slora_core.requests import Request, SamplingParams, ScheduledChunk

CPU = torch.device("cpu")


def _request(row: int, pages: list[int]) -> Request:
    request = Request("same id", [1, 2], SamplingParams())
    request.row, request.page_ids = row, pages
    return request


def _send(rows: RowState, *requests: Request) -> int:
    """Send what a step of these requests sends; returns the number of page ids."""
    chunks = [ScheduledChunk(request, 0, 1, True, False, -1) for request in requests]
    entries, page_ids = rows.new_pages(chunks)
    rows.write_pages(torch.tensor(entries).int(), torch.tensor(page_ids).int())
    return len(entries)


def _table(rows: RowState, request: Request) -> list[int]:
    table = rows.block_tables(torch.tensor([request.row]))[0]
    return table[: len(request.page_ids)].tolist()


def test_only_new_pages_are_sent() -> None:
    rows = RowState(3, 4, CPU)
    first, second = _request(0, [7, 5]), _request(2, [1])
    assert _send(rows, first, second) == 3
    first.page_ids.append(9)
    assert _send(rows, first, second) == 1
    assert _send(rows, first, second) == 0
    assert (_table(rows, first), _table(rows, second)) == ([7, 5, 9], [1])


def test_a_row_taken_over_is_sent_anew() -> None:
    rows = RowState(1, 4, CPU)
    _send(rows, _request(0, [7, 5, 3]))
    other = _request(0, [2, 4])
    assert _send(rows, other) == 2
    assert _table(rows, other) == [2, 4]


def test_a_preempted_request_is_sent_anew() -> None:
    rows = RowState(1, 4, CPU)
    request = _request(0, [7, 5])
    _send(rows, request)
    request.page_ids, request.num_preemptions = [6, 8], 1
    assert _send(rows, request) == 2
    assert _table(rows, request) == [6, 8]


def test_padding_is_written_where_no_request_reads() -> None:
    rows = RowState(2, 4, CPU)
    requests = [_request(0, [1, 2, 3, 4]), _request(1, [5, 6, 7, 8])]
    _send(rows, *requests)
    rows.write_pages(torch.tensor([rows.padding_entry] * 3), torch.tensor([9, 9, 9]).int())
    assert [_table(rows, request) for request in requests] == [[1, 2, 3, 4], [5, 6, 7, 8]]
