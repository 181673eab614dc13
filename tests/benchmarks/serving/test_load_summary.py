"""The figures of a load run on records whose figures are known by hand."""

import json

import pytest

from benchmarks.serving.load_generator import RequestRecord
from benchmarks.serving.load_summary import percentile, summarize, table


def answered(sent_s, first_s, num_tokens, gap_s):
    pieces = [sent_s + first_s + gap_s * i for i in range(num_tokens)]
    return RequestRecord(
        0,
        "m",
        due_s=sent_s,
        sent_s=sent_s,
        piece_s=pieces,
        end_s=pieces[-1],
        num_prompt_tokens=10,
        num_output_tokens=num_tokens,
    )


def failed(error):
    return RequestRecord(0, "n", due_s=1.0, sent_s=1.0, end_s=2.0, error=error)


def test_percentiles():
    assert percentile([], 50) is None
    assert percentile([4.0], 99) == 4.0
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile(list(range(101)), 90) == 90
    assert percentile([0.0, 1.0], 25) == 0.25


def test_summary_of_known_records():
    records = [
        answered(1.0, 0.5, 11, 0.1),
        answered(2.0, 7.0, 11, 0.1),
        failed("refused"),
        failed("timeout"),
    ]
    summary = summarize(records)
    assert (summary["num_requests"], summary["num_answered"]) == (4, 2)
    assert (summary["num_aborted"], summary["num_errors"]) == (1, 1)
    assert summary["errors"] == {"timeout": 1}
    assert summary["wall_s"] == 10.0
    assert summary["requests_per_s"] == pytest.approx(0.2)
    assert summary["output_tokens_per_s"] == pytest.approx(2.2)
    assert summary["total_tokens_per_s"] == pytest.approx(4.2)
    # One of four first tokens came within 6 s.
    assert summary["slo_attainment"] == 0.25
    assert summarize(records, slo_s=8)["slo_attainment"] == 0.5
    assert summary["ttft_s"]["p50"] == pytest.approx(3.75)
    assert summary["inter_token_s"]["p99"] == pytest.approx(0.1)
    assert summary["latency_s"]["p50"] == pytest.approx(4.75)


def test_several_tokens_in_a_piece():
    record = answered(0.0, 1.0, 3, 0.4)
    record.num_output_tokens = 9
    summary = summarize([record])
    assert summary["inter_token_s"]["p50"] == pytest.approx(0.1)
    assert summary["pause_s"]["p50"] == pytest.approx(0.4)


@pytest.mark.parametrize("records", [[], [failed("connect")]])
def test_a_run_without_answers(records):
    summary = summarize(records)
    assert summary["ttft_s"] == {"p50": None, "p90": None, "p99": None}
    assert "lost" in table(summary)
    json.dumps(summary, allow_nan=False)


def test_table_has_every_figure():
    text = table(summarize([answered(1.0, 0.5, 11, 0.1), failed("timeout")]))
    assert "1 of 2 requests answered, 0 aborted, 1 lost" in text
    assert "500.0 ms" in text and "100.0 ms" in text
    assert "lost: 1 x timeout" in text
