"""The benchmark of the engine reports on equal texts and refuses to on different ones."""

import pytest
import torch

from benchmarks.bench_cpu_engine import Candidate, run, table
from benchmarks.hf_reference import BASE, OutputsDifferError, Reference, Stream, check_equal
from slora_core.config import EngineConfig
from tests.factories import make_model, make_random_adapter

NUM_TOKENS = 6
STREAMS = [Stream(("a", BASE, "b")[i % 3], [5 + i, 9, 40 + i]) for i in range(5)]


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
    reference, candidate = Reference(model, adapters), Candidate(model, our_adapters, config)
    return run(reference, candidate, STREAMS, NUM_TOKENS, 1, say=lambda line: None)


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
    with pytest.raises(OutputsDifferError, match="token"):
        bench(model, adapters, others)


class Logits:
    """Token 1 leads by a margin."""

    def __init__(self, margin):
        self.values = torch.tensor([0.0, 1.0, 1.0 - margin])

    def next_logits(self, model, token_ids):
        assert (model, token_ids) == ("a", [7, 8, 1])
        return self.values


def test_only_a_near_tie_is_forgiven():
    stream = Stream("a", [7, 8])
    assert check_equal(Logits(0.0), stream, [1, 2], [1, 2])
    assert not check_equal(Logits(5e-5), stream, [1, 2, 5], [1, 1, 6])
    with pytest.raises(OutputsDifferError, match="token 1 is 2"):
        check_equal(Logits(2e-4), stream, [1, 2, 5], [1, 1, 6])
    with pytest.raises(OutputsDifferError, match="1 tokens here"):
        check_equal(Logits(0.0), stream, [1], [1, 1])
