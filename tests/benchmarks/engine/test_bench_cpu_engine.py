"""The benchmark of the engine reports on equal texts and refuses to on different ones."""

import json
import sys

import pytest

from benchmarks.engine import bench_cpu_engine
from benchmarks.engine.bench_cpu_engine import below_limits, run, table
from benchmarks.engine.streams import Candidate, Stream
from slora_core.config import EngineConfig
from tests.factories import make_model, make_random_adapter
from tests.oracle import GreedyOracle, TextsDifferError

NUM_TOKENS = 6
STREAMS = [Stream([5 + i, 9, 40 + i], ("a", None, "b")[i % 3]) for i in range(5)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    model = make_model(root / "model")
    # Two of each name, so that an engine can be given the wrong ones.
    adapters = [
        {
            name: make_random_adapter(
                root / str(turn) / name, model, seed=10 * turn + i, rank=4 + i
            )
            for i, name in enumerate("ab")
        }
        for turn in range(2)
    ]
    return model, adapters


def bench(model, adapters, our_adapters):
    config = EngineConfig(num_pool_tokens=1024)
    oracle = GreedyOracle(model, adapters, ignore_eos=True)
    candidate = Candidate(model, our_adapters, config)
    return run(oracle, candidate, STREAMS, NUM_TOKENS, 1, say=lambda line: None)


def test_rows_and_ratios(files):
    model, (adapters, _) = files
    result = bench(model, adapters, adapters)
    rates = list(result["tokens_per_s"].values())
    assert len(rates) == 6 and min(rates) > 0
    assert result["ratios"]["base_to_transformers"] == pytest.approx(rates[1] / rates[0], rel=0.05)
    assert result["ratios"]["mixed_to_one_stream"] == pytest.approx(rates[4] / rates[1], rel=0.05)
    assert "5 streams" in table(result)


def test_no_report_where_texts_differ(files):
    model, (adapters, others) = files
    with pytest.raises(TextsDifferError, match="token"):
        bench(model, adapters, others)


def test_streams_go_on_past_the_end_of_sequence_token(files, tmp_path):
    model, (adapters, _) = files
    prompt = STREAMS[0].prompt_ids
    end = GreedyOracle(model, adapters).generate(prompt, 1, "a")
    ending = make_model(tmp_path / "model", eos_token_id=end[0])
    assert GreedyOracle(ending, adapters).generate(prompt, NUM_TOKENS, "a") == end
    oracle = GreedyOracle(ending, adapters, ignore_eos=True)
    text = oracle.generate(prompt, NUM_TOKENS, "a")
    assert len(text) == NUM_TOKENS and text[:1] == end
    assert oracle.generate_anew(prompt, NUM_TOKENS, "a") == text


def run_main(files, monkeypatch, *options):
    model, (adapters, _) = files
    monkeypatch.setattr(bench_cpu_engine, "task_streams", lambda *args: STREAMS)
    paths = ["--model", str(model), "--adapters", str(adapters["a"].parent)]
    sizes = ["--num-streams", "5", "--num-tokens", str(NUM_TOKENS), "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_cpu_engine", *paths, *sizes, *options])
    bench_cpu_engine.main()


def with_limits(monkeypatch, factor):
    limits = [(name, words, limit * factor) for name, words, limit in bench_cpu_engine.LIMITS]
    monkeypatch.setattr(bench_cpu_engine, "LIMITS", limits)


def test_check_passes_above_the_limits(files, monkeypatch, capsys, tmp_path):
    with_limits(monkeypatch, 0.001)
    run_main(files, monkeypatch, "--check", "--output", str(tmp_path / "rows.jsonl"))
    line = capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "rows.jsonl").read_text() == line + "\n"
    row = json.loads(line)
    assert {"ratios", "seed", "commit", "versions", "cpu"} <= set(row)
    assert row["config"]["num_streams"] == 5


def test_check_fails_below_the_limits_and_still_reports(files, monkeypatch, capsys):
    with_limits(monkeypatch, 1000)
    with pytest.raises(SystemExit, match=r"\(at least 1000x\), .* \(at least 4000x\)"):
        run_main(files, monkeypatch, "--check")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["benchmark"] == "cpu_engine"
    run_main(files, monkeypatch)


@pytest.mark.parametrize(("base", "mixed"), [(0.999, 5.0), (1.2, 3.999)])
def test_one_ratio_below_its_limit_is_too_slow(base, mixed):
    assert below_limits({"base_to_transformers": 1.0, "mixed_to_one_stream": 4.0}) is None
    message = below_limits({"base_to_transformers": base, "mixed_to_one_stream": mixed})
    assert f"is {base:g}x (at least 1x)" in message
    assert f"is {mixed:g}x (at least 4x)" in message


def test_different_texts_leave_no_report(files, monkeypatch, capsys):
    others = files[1][1]
    monkeypatch.setattr(
        bench_cpu_engine, "Candidate", lambda model, _, config: Candidate(model, others, config)
    )
    with pytest.raises(SystemExit, match="no report: a: token"):
        run_main(files, monkeypatch)
    assert capsys.readouterr().out == ""
