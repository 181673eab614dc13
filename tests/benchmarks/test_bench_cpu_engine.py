"""The benchmark of the engine reports on equal texts and refuses to on different ones."""

import pytest

from benchmarks.bench_cpu_engine import Candidate, Stream, run, table
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
            name: make_random_adapter(root / f"{name}{turn}", model, seed=10 * turn + i, rank=4 + i)
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
