"""The whole engine by the Triton kernels: in Triton's interpreter, or on a GPU without graphs.

Few steps of a tiny model: what the kernels' own tests cannot see is how the engine calls them.
"""

import random
from dataclasses import replace

import pytest

from kernels import triton_ops
from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig, SamplingParams
from slora_core.engine import Engine, GenerationRequest
from slora_core.models.hf_config import load_model_config
from slora_core.models.weights import load_weights
from tests.factories import ALL_MODULES, make_adapter, make_model
from tests.kernels.cases import DEVICE
from tests.oracle import GreedyOracle, assert_same_greedy

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_TOKENS = 3
ADAPTERS = {
    "rank4-qv": {"rank": 4},
    "rank20-all": {"rank": 20, "target_modules": ALL_MODULES},
    "down-only": {"rank": 5, "target_modules": ("down_proj",)},
}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> GreedyOracle:
    directory = tmp_path_factory.mktemp("triton")
    model_dir = make_model(directory / "model", "llama", seed=3)
    adapters = {
        kind: make_adapter(directory / kind, model_dir, seed=index, **options)
        for index, (kind, options) in enumerate(ADAPTERS.items())
    }
    return GreedyOracle(model_dir, adapters, ignore_eos=True)


def _engine(oracle: GreedyOracle, **config) -> Engine:
    model_dir = next(iter(oracle.adapters.values())).parent / "model"
    settings = {
        "device": DEVICE.type,
        "num_pool_tokens": 1024,
        "max_batched_tokens": 64,
        "cuda_graphs": False,
        **config,
    }
    model, config = load_model_config(model_dir), EngineConfig(**settings)
    weights = load_weights(model_dir, model, config.device, config.dtype)
    engine = Engine(model, config, weights, ops=triton_ops)
    for name, path in oracle.adapters.items():
        engine.add_adapter(replace(load_packed_adapter(path, engine.geometry), adapter_id=name))
    return engine


def _entry(prompt_ids: list[int], kind: str | None) -> GenerationRequest:
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    return GenerationRequest(prompt_ids, params, kind)


def _check(oracle: GreedyOracle, engine: Engine, entries: list[GenerationRequest]) -> None:
    for entry, text in zip(entries, engine.generate(entries), strict=True):
        expected = oracle.generate(entry.prompt_ids, MAX_TOKENS, entry.adapter_id)
        assert_same_greedy(oracle, entry.prompt_ids, text, expected, entry.adapter_id)
    engine.check_integrity()


@pytest.mark.parametrize("inflight", [1, 2])
def test_mixed_adapters_in_chunks_beside_decodes(oracle: GreedyOracle, inflight: int) -> None:
    engine = _engine(oracle, max_batched_tokens=24, max_inflight_steps=inflight)
    rng = random.Random(0)
    entries = [
        _entry(rng.choices(range(3, 256), k=length), kind)
        for length, kind in zip((40, 1, 17, 9, 30), (*ADAPTERS, None, "rank4-qv"), strict=True)
    ]
    _check(oracle, engine, entries)


def test_a_shared_prefix_and_a_small_pool(oracle: GreedyOracle) -> None:
    engine = _engine(oracle, num_pool_tokens=640)
    prefix = random.Random(1).choices(range(3, 256), k=36)
    kinds = [None, "rank20-all", None, "rank20-all", "rank4-qv"]
    _check(oracle, engine, [_entry([*prefix, 3 + i], kind) for i, kind in enumerate(kinds)])
    assert engine.stats().num_cached_prompt_tokens >= 2 * 32
