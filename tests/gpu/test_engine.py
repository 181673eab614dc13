"""The engine on a GPU: graphs, overlap, eviction and the profiled pool change no text.

fp32 throughout, so that texts can be compared with transformers and PEFT.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig, SamplingParams
from slora_core.engine import Engine, GenerationRequest
from slora_core.errors import UnsupportedModelError
from slora_core.models.hf_config import load_model_config
from slora_core.models.weights import dummy_weights
from slora_core.types import Request
from tests.factories import ALL_MODULES, ATTENTION_MODULES, make_adapter, make_model
from tests.oracle import GreedyOracle, assert_same_greedy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MAX_TOKENS = 20
ADAPTERS: dict[str, dict[str, Any]] = {
    "rank4-qv": {"rank": 4},
    "rank16-all": {"rank": 16, "target_modules": ALL_MODULES, "scale": 0.08},
    "rank33-attention": {"rank": 33, "target_modules": ATTENTION_MODULES},
    "rank100-all": {"rank": 100, "target_modules": ALL_MODULES, "scale": 0.05},
}
KINDS = (None, *ADAPTERS)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("gpu") / "model", "llama", seed=3)


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> GreedyOracle:
    adapters = {
        kind: make_adapter(model_dir.parent / kind, model_dir, seed=index, **options)
        for index, (kind, options) in enumerate(ADAPTERS.items())
    }
    return GreedyOracle(model_dir, adapters, ignore_eos=True)


@pytest.fixture
def make(model_dir: Path, oracle: GreedyOracle) -> Iterator[Any]:
    def engine(**config: Any) -> Engine:
        settings = {
            "device": "cuda",
            "num_pool_tokens": 8192,
            "max_batched_tokens": 256,
            "max_running_requests": 16,
            **config,
        }
        made = Engine.from_pretrained(model_dir, EngineConfig(**settings))
        for name, path in oracle.adapters.items():
            made.add_adapter(replace(load_packed_adapter(path, made.geometry), adapter_id=name))
        return made

    yield engine
    torch.cuda.empty_cache()


def _entries(num: int, seed: int = 0, **params: Any) -> list[GenerationRequest]:
    rng = random.Random(seed)
    sampling = SamplingParams(
        **{"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True, **params}
    )
    return [
        GenerationRequest(
            rng.choices(range(3, 256), k=rng.randint(1, 90)), sampling, KINDS[i % len(KINDS)]
        )
        for i in range(num)
    ]


def _check(oracle: GreedyOracle, engine: Engine, entries: list[GenerationRequest]) -> None:
    for entry, text in zip(entries, engine.generate(entries), strict=True):
        expected = oracle.generate(entry.prompt_ids, MAX_TOKENS, entry.adapter_id)
        assert_same_greedy(oracle, entry.prompt_ids, text, expected, entry.adapter_id)
    engine.check_integrity()


@pytest.mark.parametrize("inflight", [1, 2])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_texts(make, oracle: GreedyOracle, cuda_graphs: bool, inflight: int) -> None:
    engine = make(cuda_graphs=cuda_graphs, max_inflight_steps=inflight)
    # Prompts run in graphs as rows of decodes; the rank of the last adapter has none at start.
    _check(oracle, engine, _entries(30))
    # And each alone.
    for entry in _entries(len(KINDS), seed=1):
        _check(oracle, engine, [entry])


def test_prompts_in_graphs_and_in_kernels_of_their_own(make, oracle, monkeypatch) -> None:
    replays = {}
    for pays in (False, True):
        engine = make(max_inflight_steps=2)
        monkeypatch.setattr(engine.runner._cost, "graph_pays", lambda *_, pays=pays, **__: pays)
        graphs = engine.runner._graphs
        counted: list[int] = []
        replay = graphs.replay
        graphs.replay = lambda key, fields, replay=replay, counted=counted: (
            counted.append(key.num_rows),
            replay(key, fields),
        )[1]
        _check(oracle, engine, _entries(20, seed=2))
        replays[pays] = max(counted)
    assert replays[False] <= 16 < replays[True], "whole prompts are rows of a graph"


def test_shared_prefixes(make, oracle: GreedyOracle) -> None:
    engine = make(max_inflight_steps=2)
    prefix = random.Random(5).choices(range(3, 256), k=100)
    entries = [replace(e, prompt_ids=[*prefix, *e.prompt_ids[:9]]) for e in _entries(20, seed=3)]
    for _ in range(2):
        _check(oracle, engine, entries)
    # Of each kind all but the first find the prefix, then all do.
    assert engine.stats().num_cached_prompt_tokens >= 96 * (20 - len(KINDS)) + 96 * 20


def test_evicted_adapters_and_preempted_requests(make, oracle: GreedyOracle) -> None:
    engine = make(num_pool_tokens=2400, admission_output_tokens=1, max_inflight_steps=2)
    # A request that may stop is admitted by less than its max_tokens.
    _check(oracle, engine, _entries(40, seed=4, stop=("never",)))
    stats = engine.stats()
    assert stats.num_adapter_evictions > 0 and stats.num_preemptions > 0


def test_seeds_sample_the_same_text_eagerly_and_in_graphs(make) -> None:
    sampled = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 7}
    texts = [
        make(cuda_graphs=graphs, max_inflight_steps=inflight).generate(_entries(10, **sampled))
        for graphs, inflight in ((False, 1), (True, 1), (True, 2))
    ]
    assert texts[0] == texts[1] == texts[2]


def test_base_rows_have_the_same_bits_beside_adapters(make) -> None:
    engine = make(max_inflight_steps=1)
    entries = _entries(10, seed=6)
    mixed = engine.generate(entries)
    base = engine.generate([replace(entry, adapter_id=None) for entry in entries])
    assert [a == b for a, b in zip(mixed, base, strict=True)] == [
        entry.adapter_id is None for entry in entries
    ]


def test_steady_decoding_waits_for_nothing(make) -> None:
    engine = make(max_inflight_steps=2)
    entries = _entries(12, seed=7, max_tokens=80)
    # Not the adapter whose graphs are captured when it is first used.
    live = [e for e in entries if e.adapter_id != "rank100-all"]
    for index, entry in enumerate(live):
        engine.add_request(
            Request(str(index), list(entry.prompt_ids), entry.params, entry.adapter_id)
        )
    for _ in range(10):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.stats().num_running == len(live)


def test_the_pool_takes_what_memory_leaves(model_dir: Path) -> None:
    free, total = torch.cuda.mem_get_info()
    share = 1 - free / total + 0.05
    config = EngineConfig(device="cuda", num_pool_tokens=None, memory_utilization=share)
    engine = Engine.from_pretrained(model_dir, config)
    used = total - torch.cuda.mem_get_info()[0]
    assert 0.02 * total < used - (total - free) < 0.06 * total
    assert list(engine.startup_s) == ["weights", "profile", "pool", "kernels", "graphs"]
    [text] = engine.generate([GenerationRequest([5, 6, 7], SamplingParams(ignore_eos=True))])
    assert len(text) == 16


def test_no_memory_left_for_the_pool(model_dir: Path) -> None:
    model = load_model_config(model_dir)
    config = EngineConfig(device="cuda", num_pool_tokens=None, memory_utilization=0.001)
    with pytest.raises(UnsupportedModelError, match="leaves no memory for the pool"):
        Engine(model, config, dummy_weights(model, "cuda", torch.float32))
