"""Greedy texts of the engine equal transformers + PEFT, whatever shares the pool and the batch."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.errors import InvalidRequestError
from slora_core.requests import Request, SamplingParams
from tests.factories import (
    ALL_MODULES,
    ATTENTION_MODULES,
    LLAMA3_ROPE,
    family_options,
    make_adapter,
    make_model,
)
from tests.oracle import GreedyOracle, assert_same_greedy
from tests.slora_core.engine.planned_steps import plan_step

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    # Prompts pass the 32 positions of the original context.
    "llama-tied-llama3-rope": (
        "llama",
        {"tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE},
    ),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    # As Phi-3-mini: no grouped heads, turned whole.
    "phi3-mini": ("phi3", {"partial_rotary_factor": 1.0, "num_key_value_heads": 4}),
}

ADAPTERS: dict[str, dict[str, Any]] = {
    "rank4-qv": {"rank": 4},
    "rank8-attention": {"rank": 8, "target_modules": ATTENTION_MODULES},
    "rank16-all": {"rank": 16, "target_modules": ALL_MODULES, "scale": 0.08},
    "rank64-qv": {"rank": 64, "scale": 0.1},
    "rslora": {"rank": 16, "use_rslora": True, "alpha": 6, "target_modules": ALL_MODULES},
    "rank-pattern": {
        "rank": 8,
        "target_modules": ALL_MODULES,
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 20},
    },
    "alpha-pattern": {
        "rank": 8,
        "target_modules": ("q_proj", "v_proj", "up_proj"),
        "alpha_pattern": {"v_proj": 40, "layers.0.mlp.up_proj": 2},
    },
    "last-layer": {"rank": 8, "target_modules": ALL_MODULES, "layers_to_transform": [1]},
    "down-only": {"rank": 5, "target_modules": ("down_proj",)},
}
KINDS = (None, *ADAPTERS)


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class World:
    """A tiny model, its adapters on disk, and their truth."""

    model_dir: Path
    oracle: GreedyOracle

    def engine(self, **config: Any) -> Engine:
        """An engine that knows every adapter; the defaults leave room for everything."""
        settings = {"num_pool_tokens": 8192, "max_batched_tokens": 256, **config}
        engine = Engine.from_pretrained(self.model_dir, EngineConfig(**settings))
        for name, path in self.oracle.adapters.items():
            packed = load_packed_adapter(path, engine.geometry)
            # Known by its name here, so that tests can be read.
            engine.add_adapter(type(packed)(name, packed.layout, packed.pages))
        return engine

    def check(self, prompt: Sequence[int], actual: Sequence[int], max_tokens: int, kind) -> None:
        expected = self.oracle.generate(prompt, max_tokens, kind)
        assert_same_greedy(self.oracle, prompt, actual, expected, kind)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return {}


@pytest.fixture
def world(request, worlds: dict[str, World], tmp_path_factory) -> World:
    """The world of the model that a test names, made once; "llama" where it names none."""
    name = getattr(request, "param", "llama")
    if name not in worlds:
        family, shape = MODELS[name]
        directory = tmp_path_factory.mktemp(name)
        model_dir = make_model(directory / "model", family, seed=3, **shape)
        adapters = {
            kind: make_adapter(
                directory / kind, model_dir, seed=index, **family_options(family, options)
            )
            for index, (kind, options) in enumerate(ADAPTERS.items())
        }
        worlds[name] = World(model_dir, GreedyOracle(model_dir, adapters))
    return worlds[name]


every_model = pytest.mark.parametrize("world", list(MODELS), indirect=True)
# Steps in flight: with two, a step is planned before the tokens of the one before are known.
inflight_steps = pytest.mark.parametrize("inflight", [1, 2])


def _prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(1000 * seed + length).choices(range(3, 256), k=length)


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0)


def _generate(engine: Engine, prompts: list[tuple[list[int], str | None]], max_tokens: int):
    return engine.generate([Request(prompt, _greedy(max_tokens), kind) for prompt, kind in prompts])


def _request(name: str, prompt: list[int], max_tokens: int, kind: str | None = None) -> Request:
    return Request(prompt, _greedy(max_tokens), kind, request_id=name)


@every_model
def test_base(world: World) -> None:
    # One token, a page's border and both sides of it, and several pages.
    prompts = [_prompt(length) for length in (1, 15, 16, 17, 60)]
    engine = world.engine()
    together = _generate(engine, [(prompt, None) for prompt in prompts], 24)
    for prompt, actual in zip(prompts, together, strict=True):
        world.check(prompt, actual, 24, None)
        (alone,) = _generate(engine, [(prompt, None)], 24)
        world.check(prompt, alone, 24, None)
    assert engine.stats().num_adapter_pages == 0
    engine.check_integrity()


@every_model
def test_each_adapter_alone(world: World) -> None:
    engine = world.engine()
    prompt = _prompt(20)
    texts = set()
    for kind in ADAPTERS:
        (actual,) = _generate(engine, [(prompt, kind)], 16)
        world.check(prompt, actual, 16, kind)
        texts.add(tuple(actual))
    base = tuple(world.oracle.generate(prompt, 16))
    assert len(texts - {base}) == len(ADAPTERS), "adapters that change nothing prove nothing"


@every_model
@inflight_steps
def test_mixed_batch_of_everything(world: World, inflight: int) -> None:
    """Base and every adapter, two requests each, prefills and decodes mixed by a small budget."""
    requests = [
        (_prompt(5 + 7 * index, seed), kind) for seed in (1, 2) for index, kind in enumerate(KINDS)
    ]
    random.Random(1).shuffle(requests)
    engine = world.engine(max_batched_tokens=48, max_inflight_steps=inflight)
    for (prompt, kind), actual in zip(requests, _generate(engine, requests, 16), strict=True):
        world.check(prompt, actual, 16, kind)
    assert engine.stats().num_adapter_loads == len(ADAPTERS)
    engine.check_integrity()


@every_model
@pytest.mark.parametrize("kind", [None, "rank16-all"])
@inflight_steps
def test_prompt_longer_than_a_chunk(world: World, kind: str | None, inflight: int) -> None:
    prompt = _prompt(150)
    engine = world.engine(max_batched_tokens=16, max_inflight_steps=inflight)
    # A decode runs beside the chunks and takes one token of each.
    requests = [(_prompt(3), None), (prompt, kind)]
    texts = _generate(engine, requests, 20)
    assert engine.stats().num_steps >= 150 // 16 + len(texts[1])
    for (ids, adapter), actual in zip(requests, texts, strict=True):
        world.check(ids, actual, 20, adapter)


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_context_that_ends_with_the_sliding_window(tmp_path: Path, family: str) -> None:
    model_dir = make_model(tmp_path / "model", family, seed=3, sliding_window=40)
    oracle = GreedyOracle(model_dir)
    engine = Engine.from_pretrained(model_dir, EngineConfig(num_pool_tokens=1024))
    prompt = _prompt(28)
    (text,) = _generate(engine, [(prompt, None)], 12)
    assert_same_greedy(oracle, prompt, text, oracle.generate(prompt, 12))
    with pytest.raises(InvalidRequestError, match="exceed the context of 40 tokens"):
        _generate(engine, [(prompt, None)], 13)


@pytest.mark.parametrize("page_tokens", [8, 32, 64])
def test_page_sizes(world: World, page_tokens: int) -> None:
    requests = [(_prompt(4 + 9 * index), kind) for index, kind in enumerate(KINDS)]
    engine = world.engine(page_tokens=page_tokens, max_batched_tokens=40)
    for (prompt, kind), actual in zip(requests, _generate(engine, requests, 12), strict=True):
        world.check(prompt, actual, 12, kind)


@every_model
@inflight_steps
def test_after_eviction_and_reload(world: World, inflight: int) -> None:
    """The pool has no room for two of these adapters beside a request's KV."""
    first, second = "rank16-all", "rslora"
    pages = {
        kind: load_packed_adapter(world.oracle.adapters[kind], world.engine().geometry)
        for kind in (first, second)
    }
    largest = max(packed.layout.num_pages for packed in pages.values())
    engine = world.engine(num_pool_tokens=16 * (largest + 4), max_inflight_steps=inflight)
    prompt = _prompt(30)
    for kind in (first, second, first, None, second):
        (actual,) = _generate(engine, [(prompt, kind)], 16)
        world.check(prompt, actual, 16, kind)
        engine.check_integrity()
    stats = engine.stats()
    assert stats.num_adapter_loads == 4
    assert stats.num_adapter_evictions == 3
    assert stats.resident_adapters == (second,)


@every_model
@inflight_steps
def test_after_preemption(world: World, inflight: int) -> None:
    """Requests that outgrow what was assumed are thrown out and recomputed, adapter and all."""
    kinds = [None, "rank4-qv", None, "rank8-attention", "rank4-qv"]
    requests = [(_prompt(30, seed), kind) for seed, kind in enumerate(kinds)]
    engine = world.engine(
        num_pool_tokens=16 * 20, admission_output_tokens=0, max_inflight_steps=inflight
    )
    live = [
        engine.add_request(_request(str(i), prompt, 40, kind))
        for i, (prompt, kind) in enumerate(requests)
    ]
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert engine.stats().num_preemptions >= 2
    preempted_kinds = {request.adapter_id for request in live if request.num_preemptions}
    assert preempted_kinds & set(ADAPTERS), "no request with an adapter was preempted"
    for request in live:
        world.check(request.prompt_ids, request.output_ids, 40, request.adapter_id)


@inflight_steps
def test_after_abort_of_others(world: World, inflight: int) -> None:
    """Others leave while they wait, in the middle of their prompt, and while they decode."""
    engine = world.engine(
        max_batched_tokens=32, max_running_requests=6, max_inflight_steps=inflight
    )
    kept = [_request(f"kept-{kind}", _prompt(12), 24, kind) for kind in KINDS[:4]]
    leaving = [_request(f"leaving-{i}", _prompt(40, i), 24, kind) for i, kind in enumerate(KINDS)]
    order = (leaving[0], kept[0], leaving[1], *kept[1:], *leaving[2:])
    states = {request.request_id: engine.add_request(request) for request in order}
    ready_to_leave = {
        "decoding": lambda request: len(request.output_ids) >= 5,
        "prefilling": lambda request: 0 < request.num_computed < 40,
        "waiting": lambda request: not request.page_ids and engine.stats().num_steps == 3,
    }
    ways = [*["decoding"] * 3, *["prefilling"] * 3, *["waiting"] * 4]
    left = []
    while engine.has_work:
        engine.step()
        for way, request in zip(ways, leaving, strict=True):
            state = states[request.request_id]
            if ready_to_leave[way](state) and engine.abort(request.request_id):
                left.append(way)
                engine.check_integrity()
    aborted = len(left)
    assert set(left) == set(ways)
    assert engine.stats().num_aborted == aborted
    assert engine.stats().num_kv_pages == 0
    for request in kept:
        text = states[request.request_id].output_ids
        world.check(request.prompt_ids, text, 24, request.adapter_id)


@every_model
@pytest.mark.parametrize("budget", [256, 40])
def test_base_rows_are_bit_identical_with_adapters_taken_off(world: World, budget: int) -> None:
    engine = world.engine(max_batched_tokens=budget)
    kinds = [kind for pair in zip([None] * len(ADAPTERS), ADAPTERS, strict=True) for kind in pair]
    for index, kind in enumerate(kinds):
        engine.add_request(_request(str(index), _prompt(3 + 5 * index), 30, kind))
    compared = {True: 0, False: 0}
    for _ in range(14):
        plan = plan_step(engine)
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        inputs = engine.builder.build(plan.chunks)
        mixed = engine.runner.logits(inputs)
        without = [chunk._replace(slot=-1) for chunk in plan.chunks]
        stripped = engine.runner.logits(engine.builder.build(without))
        # Rewrite the KV that the stripped step wrote, and get the same bits as before.
        assert torch.equal(engine.runner.logits(inputs), mixed)

        for row, chunk in enumerate(sampling):
            is_base = chunk.request.adapter_id is None
            if any(chunk.slot >= 0 for chunk in plan.chunks):
                compared[is_base] += 1
                assert torch.equal(mixed[row], stripped[row]) is is_base
        engine.scheduler.commit(plan, mixed.argmax(-1).tolist())
    assert compared[True] > 20 and compared[False] > 20
