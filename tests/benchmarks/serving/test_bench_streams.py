"""The benchmark of streams runs, and compares every text before it reports."""

import json

import pytest

from benchmarks.serving import bench_streams
from tests.tiny_tokenizer import make_tokenizer


@pytest.fixture
def no_freeze(monkeypatch):
    monkeypatch.setattr(bench_streams.gc, "freeze", lambda: None)


def test_rows_of_both_sides(tmp_path, monkeypatch, capsys, no_freeze):
    directory = make_tokenizer(tmp_path)
    monkeypatch.setattr(bench_streams, "ensure_demo_model", lambda: directory)
    bench_streams.main(["--streams", "1", "5", "--tokens", "20", "--repeats", "1"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sides = [(row["side"], row["num_streams"]) for row in rows]
    assert sides == [(s, n) for n in (1, 5) for s in ("replica", "ingress", "ingress")]
    for row in rows:
        assert row["us_per_token"] > 0
        # The first token at once, then what gathers in three steps.
        assert 1 < row["tokens_per_delta"] <= 4


def test_a_text_that_comes_out_wrong_is_no_report(tmp_path, monkeypatch, no_freeze):
    directory = make_tokenizer(tmp_path)
    monkeypatch.setattr(bench_streams, "ensure_demo_model", lambda: directory)
    add = bench_streams.StepOutput.add
    monkeypatch.setattr(
        bench_streams.StepOutput,
        "add",
        lambda self, name, token, ending: add(self, name, token + 1, ending),
    )
    with pytest.raises(AssertionError):
        bench_streams.main(["--streams", "1", "--tokens", "20", "--repeats", "1"])
