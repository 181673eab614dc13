"""The client keeps true times and gives every failure its name."""

import asyncio
from types import SimpleNamespace

import pytest

from benchmarks.serving import load_generator
from benchmarks.serving.load_generator import LoadGenerator, LoadLimits, PlannedRequest
from tests.benchmarks.serving.fake_server import NUM_TOGETHER, FakeServer
from tests.virtual_time import run_in_virtual_time


def planned(model, due_s=0.0, num_tokens=4):
    body = {"model": model, "prompt": [1, 2, 3], "max_tokens": num_tokens}
    return PlannedRequest(due_s, body)


def run(requests, limits=None, on_change=lambda record: None):
    async def main():
        async with FakeServer() as server:
            generator = LoadGenerator(server.url, limits, on_change)
            return await generator.run(requests), server

    return asyncio.run(main())


def test_an_answered_request():
    [record], server = run([planned("ok")])
    assert record.is_answered and (record.status, record.error) == (200, None)
    assert (record.num_prompt_tokens, record.num_output_tokens) == (3, 4)
    assert (record.text, record.finish_reason) == (" x x x x", "length")
    assert len(record.piece_s) == 4
    times = [record.sent_s, *record.piece_s, record.end_s]
    assert times == sorted(times)
    assert server.bodies[0]["stream_options"] == {"include_usage": True}


def test_tokens_are_counted_by_the_usage_and_not_by_the_pieces():
    [record], _ = run([planned("pairs", num_tokens=6)])
    assert (len(record.piece_s), record.num_output_tokens) == (3, 6)


def test_requests_do_not_wait_for_each_other():
    """Nobody is answered before all have been sent."""
    requests = [planned("together", due_s=0.05 * i) for i in range(NUM_TOGETHER)]
    records, server = run(requests, LoadLimits(request_timeout_s=60))
    assert all(record.is_answered for record in records)
    assert server.max_open == NUM_TOGETHER
    last_sent_s = max(record.sent_s for record in records)
    assert all(record.piece_s[0] >= last_sent_s for record in records)


def test_requests_are_sent_when_they_are_due(monkeypatch):
    async def answer_late(self, client, request, record):
        await asyncio.sleep(100)

    clock = SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr(load_generator, "time", clock)
    monkeypatch.setattr(LoadGenerator, "_stream", answer_late)
    due = [0.3, 0.0, 0.05, 0.1, 7.5]
    requests = [planned("ok", due_s) for due_s in due]
    records = run_in_virtual_time(LoadGenerator("http://nowhere").run(requests))
    assert [record.sent_s for record in records] == pytest.approx(due)
    assert [record.end_s for record in records] == pytest.approx([due_s + 100 for due_s in due])


def test_records_keep_the_order_of_the_plan():
    records, _ = run([planned("pairs", due_s=0.1), planned("ok", due_s=0.0)])
    assert [record.model for record in records] == ["pairs", "ok"]
    assert records[1].sent_s < records[0].sent_s


@pytest.mark.parametrize(
    ("model", "kind", "status"),
    [
        ("busy", "refused", 503),
        ("unknown", "status", 404),
        ("cut", "disconnect", 200),
        ("short", "disconnect", 200),
        ("sick", "stream_error", 200),
        ("garbage", "bad_event", 200),
        ("mute", "no_usage", 200),
    ],
)
def test_failures_have_names_and_cost_nobody_else(model, kind, status):
    records, _ = run([planned(model), planned("ok")])
    assert (records[0].error, records[0].status) == (kind, status)
    assert not records[0].is_answered and records[0].end_s is not None
    assert records[0].error_detail
    assert records[1].is_answered


def test_nobody_answers():
    async def main():
        async with FakeServer() as server:
            url = server.url
        return await LoadGenerator(url).run([planned("ok")])

    [record] = asyncio.run(main())
    assert record.error == "connect"


@pytest.mark.parametrize(
    "limits",
    [LoadLimits(request_timeout_s=0.2), LoadLimits(drain_timeout_s=0.2)],
)
def test_a_run_ends_whatever_the_server_does(limits):
    records, _ = run([planned("stuck"), planned("ok")], limits)
    assert [record.error for record in records] == ["timeout", None]


def test_no_more_requests_are_open_than_allowed():
    requests = [planned("slow") for _ in range(8)]
    records, server = run(requests, LoadLimits(max_in_flight=3))
    assert server.max_open == 3
    assert [record.error for record in records].count("not_sent") == 5
    assert sum(record.is_answered for record in records) == 3


def test_progress_hears_of_every_request_twice():
    heard = []
    run([planned("ok"), planned("busy")], on_change=lambda r: heard.append((r.index, r.end_s)))
    assert [index for index, end_s in heard if end_s is None] == [0, 1]
    assert sorted(index for index, end_s in heard if end_s is not None) == [0, 1]
