"""Nothing ends a text before its min_tokens: ends are masked, on the base model and adapters."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.models.registry import load_model_config
from slora_core.models.weights import load_weights
from slora_core.requests import FinishReason, Request, SamplingParams
from tests.factories import make_model, make_random_adapter

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [5, 6, 7]
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 1.0, "seed": 3}
FILTERED = {"temperature": 0.8, "seed": 4, "top_k": 40, "top_p": 0.95}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("min_tokens")
    make_model(directory / "model", "llama", seed=4)
    make_random_adapter(directory / "adapter", directory / "model", seed=1, rank=8)
    return directory


@pytest.fixture
def make_engine(directory: Path) -> Callable[..., Engine]:
    def make(eos_token_ids: tuple[int, ...] = (), num_inflight: int = 2) -> Engine:
        model = replace(load_model_config(directory / "model"), eos_token_ids=eos_token_ids)
        weights = load_weights(directory / "model", model, "cpu", torch.float32)
        config = EngineConfig(num_pool_tokens=4096, max_inflight_steps=num_inflight)
        engine = Engine(model, config, weights)
        packed = load_packed_adapter(directory / "adapter", engine.geometry)
        engine.add_adapter(replace(packed, adapter_id="a"))
        return engine

    return make


def _request(adapter_id: str | None = None, **params) -> Request:
    return Request(PROMPT, SamplingParams(**{"max_tokens": 12, **params}), adapter_id)


def _run(engine: Engine, request: Request) -> tuple[list[int], FinishReason | None]:
    state = engine.add_request(request)
    reason = None
    while engine.has_work:
        for delta in engine.step().deltas():
            reason = delta.finish_reason or reason
    return state.output_ids, reason


@pytest.mark.parametrize("num_inflight", [1, 2])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, FILTERED])
@pytest.mark.parametrize("adapter_id", [None, "a"])
@pytest.mark.parametrize("by_eos", [True, False])
def test_an_end_does_not_come_before_min_tokens(
    make_engine, settings, adapter_id, by_eos: bool, num_inflight: int
) -> None:
    free, _ = _run(make_engine(), _request(adapter_id, **settings))
    # What the model says first, and third, would each end the text.
    ends = (free[0], free[2])
    engine = make_engine(ends if by_eos else (), num_inflight)
    stops = {} if by_eos else {"stop_token_ids": ends}
    text, reason = _run(engine, _request(adapter_id, **settings, **stops))
    assert (text, reason) == ([free[0]], FinishReason.STOP)
    for min_tokens in (1, 5, 12):
        params = {**settings, **stops, "min_tokens": min_tokens}
        text, reason = _run(engine, _request(adapter_id, **params))
        assert len(text) >= min_tokens
        assert not set(ends) & set(text[:min_tokens])
        assert reason is FinishReason.LENGTH or (text[-1] in ends and len(text) > min_tokens)
    engine.check_integrity()


def test_the_end_comes_with_the_first_token_that_may_be_one(make_engine) -> None:
    # Greedy: masked until then, the text goes another way and then may end at once.
    free, _ = _run(make_engine(), _request(**GREEDY))
    end = free[3]
    index = free.index(end)
    engine = make_engine((end,))
    for min_tokens in range(index + 1):
        text, reason = _run(engine, _request(**GREEDY, min_tokens=min_tokens))
        assert (text, reason) == (free[: index + 1], FinishReason.STOP)


def test_tokens_that_end_nothing_are_not_masked(make_engine) -> None:
    free, _ = _run(make_engine(), _request(**GREEDY))
    engine = make_engine((free[0],))
    text, reason = _run(engine, _request(**GREEDY, min_tokens=12, ignore_eos=True))
    assert (text, reason) == (free, FinishReason.LENGTH)
    # Nor in the rows of others.
    requests = [_request(**GREEDY, min_tokens=12), _request(**GREEDY, ignore_eos=True)]
    masked, others = engine.generate(requests)
    assert others == free and free[0] not in masked


def test_a_continued_text_counts_what_it_has(make_engine) -> None:
    free, _ = _run(make_engine(), _request(**GREEDY))
    end = free[6]
    engine = make_engine((end,))
    params = SamplingParams(max_tokens=12, **GREEDY, min_tokens=8)
    whole, _ = _run(engine, Request(PROMPT, params))
    continued, _ = _run(engine, Request(PROMPT, params, output_ids=whole[:4]))
    assert continued == whole and end not in whole[:8]


def test_where_every_token_would_end_the_text_it_goes_on(make_engine) -> None:
    engine = make_engine(tuple(range(256)))
    for settings in (GREEDY, SAMPLED, FILTERED):
        text, reason = _run(engine, _request(**settings, min_tokens=5))
        assert (len(text), reason) == (6, FinishReason.STOP)
