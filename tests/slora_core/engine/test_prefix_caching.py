"""Texts on shared prefixes equal transformers + PEFT, and only what is new is computed."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.requests import Request, SamplingParams
from tests.factories import ALL_MODULES, make_adapter, make_model
from tests.oracle import GreedyOracle, assert_same_greedy

pytestmark = pytest.mark.usefixtures("one_thread")

# Two versions of one adapter, by content; and one of another rank.
ADAPTERS = {
    "v1": {"seed": 1, "rank": 8},
    "v2": {"seed": 2, "rank": 8},
    "wide": {"seed": 3, "rank": 16},
}
KINDS = (None, *ADAPTERS)
MAX_TOKENS = 12
PREFIX = random.Random(0).choices(range(3, 256), k=100)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> GreedyOracle:
    directory = tmp_path_factory.mktemp("prefix")
    model_dir = make_model(directory / "model", "llama", seed=3)
    adapters = {
        kind: make_adapter(directory / kind, model_dir, target_modules=ALL_MODULES, **options)
        for kind, options in ADAPTERS.items()
    }
    return GreedyOracle(model_dir, adapters)


@pytest.fixture
def model_dir(oracle: GreedyOracle) -> Path:
    return next(iter(oracle.adapters.values())).parent / "model"


def _engine(model_dir: Path, oracle: GreedyOracle, **config) -> Engine:
    settings = {"num_pool_tokens": 8192, "max_batched_tokens": 256, **config}
    engine = Engine.from_pretrained(model_dir, EngineConfig(**settings))
    for name, path in oracle.adapters.items():
        engine.add_adapter(replace(load_packed_adapter(path, engine.geometry), adapter_id=name))
    return engine


def _entry(tail: list[int], kind: str | None, prefix: list[int] = PREFIX) -> Request:
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    return Request([*prefix, *tail], params, kind)


def _check(oracle: GreedyOracle, engine: Engine, entries: list[Request]) -> None:
    """Run the entries together; each text is that of transformers."""
    for entry, text in zip(entries, engine.generate(entries), strict=True):
        expected = oracle.generate(entry.prompt_ids, MAX_TOKENS, entry.adapter_id)
        assert_same_greedy(oracle, entry.prompt_ids, text, expected, entry.adapter_id)
    engine.check_integrity()


@pytest.mark.parametrize("inflight", [1, 2])
def test_texts_of_prompts_that_share_their_steps(
    model_dir: Path, oracle: GreedyOracle, inflight: int
) -> None:
    """Beside a long prompt, one is overtaken and goes on with what a shorter one computed."""
    engine = _engine(model_dir, oracle, max_batched_tokens=64, max_inflight_steps=inflight)
    long = _entry([], None, random.Random(1).choices(range(3, 256), k=400))
    entries = [long, _entry([8] * 60, "v1"), _entry([9] * 30, "wide"), _entry([7] * 9, None)]
    states = [engine.add_request(entry) for entry in entries]
    for _ in range(2):
        engine.step()
    # The same prefix, behind one of that adapter.
    entries += [_entry([6] * 5, "v1"), _entry([5] * 3, "v1")]
    states += [engine.add_request(entry) for entry in entries[4:]]
    within = 0
    while engine.has_work:
        engine.step()
        within = max(within, sum(0 < s.num_computed < len(s.prompt_ids) for s in states))
    for entry, state in zip(entries, states, strict=True):
        expected = oracle.generate(entry.prompt_ids, MAX_TOKENS, entry.adapter_id)
        assert_same_greedy(oracle, entry.prompt_ids, state.output_ids, expected, entry.adapter_id)
    engine.check_integrity()
    assert within >= 3
    # Of three with that adapter, computed once between them.
    assert engine.stats().num_cached_prompt_tokens >= 2 * 96


@pytest.mark.parametrize("inflight", [1, 2])
@pytest.mark.parametrize("budget", [256, 40])
def test_texts_on_shared_prefixes(
    model_dir: Path, oracle: GreedyOracle, budget: int, inflight: int
) -> None:
    engine = _engine(model_dir, oracle, max_batched_tokens=budget, max_inflight_steps=inflight)
    entries = [_entry([10 + i] * (1 + 9 * i), kind) for kind in KINDS for i in range(4)]
    _check(oracle, engine, entries)
    found = engine.stats().num_cached_prompt_tokens
    # Three of four requests of each adapter find the six full pages of the prefix.
    assert found == len(KINDS) * 3 * 96
    # Now all do, and most of the tails.
    _check(oracle, engine, entries)
    prompts = [len(entry.prompt_ids) for entry in entries]
    assert engine.stats().num_cached_prompt_tokens - found == sum(
        (n - 2) // 16 * 16 for n in prompts
    )
    stats = engine.stats()
    assert stats.num_kv_pages == 0
    pages = stats.num_free_pages + stats.num_idle_prefix_pages + stats.num_adapter_pages
    assert pages == stats.num_pages


def _cached_tokens(engine: Engine, entries: list[Request]) -> list[dict[str, int]]:
    """Run the entries one after the other; what each step told of prompts, where it told any."""
    told = []
    for entry in entries:
        engine.add_request(entry)
        while engine.has_work:
            output = engine.step()
            assert output.cached_tokens.keys() <= set(output.request_ids)
            told += [output.cached_tokens] if output.cached_tokens else []
    return told


@pytest.mark.parametrize("inflight", [1, 2])
def test_the_first_token_comes_with_what_was_cached(
    model_dir: Path, oracle: GreedyOracle, inflight: int
) -> None:
    engine = _engine(model_dir, oracle, max_inflight_steps=inflight)
    entries = [_entry([10 + i], kind) for kind in (None, "v1", "v2") for i in range(3)]
    told = _cached_tokens(engine, entries)
    # The first on each adapter finds nothing, the next two six full pages of sixteen.
    ids = [entry.request_id for entry in entries]
    assert told == [{ids[i]: 96} for i in (1, 2, 4, 5, 7, 8)]
    assert sum(sum(each.values()) for each in told) == engine.stats().num_cached_prompt_tokens
    # A text that is continued was told of where it began.
    begun = replace(_entry([11], None), output_ids=[30, 31], request_id="continued")
    assert _cached_tokens(engine, [begun]) == []
    assert _cached_tokens(_engine(model_dir, oracle, prefix_caching=False), entries[:3]) == []


def test_a_preempted_request_tells_of_its_first_start(
    model_dir: Path, oracle: GreedyOracle
) -> None:
    # Six shared pages and five of its own for each of four are more than the pool has.
    engine = _engine(
        model_dir, oracle, num_pool_tokens=16 * 18, admission_output_tokens=0, max_inflight_steps=1
    )
    _cached_tokens(engine, [_entry([9], None)])
    entries = [_entry([10 + i] * 3, None) for i in range(4)]
    entries = [
        replace(entry, sampling=replace(entry.sampling, max_tokens=60, ignore_eos=False))
        for entry in entries
    ]
    for entry in entries:
        engine.add_request(entry)
    told: dict[str, int] = {}
    while engine.has_work:
        cached = engine.step().cached_tokens
        assert not cached.keys() & told.keys()
        told |= cached
    assert engine.stats().num_preemptions > 0
    assert told == {entry.request_id: 96 for entry in entries}


def test_a_conversation_computes_only_its_new_turns(model_dir: Path, oracle: GreedyOracle) -> None:
    engine = _engine(model_dir, oracle)
    conversation = list(PREFIX)
    for turn in range(4):
        before = engine.stats().num_cached_prompt_tokens
        entry = _entry([3 + turn] * 5, "v1", conversation)
        [text] = engine.generate([entry])
        expected = oracle.generate(entry.prompt_ids, MAX_TOKENS, "v1")
        assert_same_greedy(oracle, entry.prompt_ids, text, expected, "v1")
        if turn:
            # All but the turn, and what had not filled a page, its last token's KV included.
            num_new = len(entry.prompt_ids) - (engine.stats().num_cached_prompt_tokens - before)
            assert 5 < num_new <= 5 + 16
        conversation = [*entry.prompt_ids, *text]


def test_a_dropped_version_is_not_found_again(model_dir: Path, oracle: GreedyOracle) -> None:
    engine = _engine(model_dir, oracle)
    _check(oracle, engine, [_entry([5], "v1"), _entry([5], "v2")])
    engine.drop_adapter("v1")
    _check(oracle, engine, [_entry([5], "v1")])
    assert engine.stats().num_cached_prompt_tokens == 0
    _check(oracle, engine, [_entry([5], "v2")])
    assert engine.stats().num_cached_prompt_tokens == 96


def test_a_small_pool_evicts_prefixes_and_adapters(model_dir: Path, oracle: GreedyOracle) -> None:
    # Two or three requests and an adapter or two at a time.
    engine = _engine(model_dir, oracle, num_pool_tokens=640, admission_output_tokens=1)
    rng = random.Random(1)
    heads = [rng.choices(range(3, 256), k=60) for _ in range(4)]
    entries = [_entry([i], rng.choice(KINDS), rng.choice(heads)) for i in range(3, 43)]
    _check(oracle, engine, entries)
    stats = engine.stats()
    assert stats.num_adapter_evictions > 0
    assert 0 < stats.num_cached_prompt_tokens < 40 * 48


def test_switched_off_nothing_is_kept(model_dir: Path, oracle: GreedyOracle) -> None:
    engine = _engine(model_dir, oracle, prefix_caching=False)
    for _ in range(2):
        _check(oracle, engine, [_entry([5], None), _entry([6], None)])
    stats = engine.stats()
    assert stats.num_cached_prompt_tokens == stats.num_idle_prefix_pages == 0
    assert stats.num_free_pages == stats.num_pages
