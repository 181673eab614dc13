"""The whole engine by the Triton kernels: in Triton's interpreter, or on a GPU without graphs.

Few steps of a tiny model: what the kernels' own tests cannot see is how the engine calls them.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import torch_ops, triton_ops
from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.dtypes import dtype_name, torch_dtype
from slora_core.engine.engine import Engine
from slora_core.execution.model_runner import ModelRunner
from slora_core.execution.step_builder import StepBuilder
from slora_core.execution.warm_up import compile_kernels
from slora_core.models.registry import load_model_config
from slora_core.models.weights import load_weights
from slora_core.requests import Request, SamplingParams
from tests.factories import ALL_MODULES, family_options, make_adapter, make_model
from tests.kernels.cases import DEVICE, DTYPES, TOLERANCES
from tests.oracle import GreedyOracle, assert_same_greedy
from tests.slora_core.engine.planned_steps import load_adapters, plan_step

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_TOKENS = 3
ADAPTERS = {
    "rank4-qv": {"rank": 4},
    "rank20-all": {"rank": 20, "target_modules": ALL_MODULES},
    "down-only": {"rank": 5, "target_modules": ("down_proj",)},
}


def _make_files(
    directory: Path, family: str = "llama", **shape: int
) -> tuple[Path, dict[str, Path]]:
    """The directories of a model and of its adapters by name."""
    model_dir = make_model(directory / "model", family, seed=3, **shape)
    adapters = {
        kind: make_adapter(
            directory / kind, model_dir, seed=index, **family_options(family, options)
        )
        for index, (kind, options) in enumerate(ADAPTERS.items())
    }
    return model_dir, adapters


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return _make_files(tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def oracle(files: tuple[Path, dict[str, Path]]) -> GreedyOracle:
    return GreedyOracle(*files, ignore_eos=True)


def _engine(files: tuple[Path, dict[str, Path]], **config) -> Engine:
    model_dir, adapters = files
    settings = {
        "device": DEVICE.type,
        "num_pool_tokens": 1024,
        "max_batched_tokens": 64,
        "cuda_graphs": False,
        **config,
    }
    model, config = load_model_config(model_dir), EngineConfig(**settings)
    weights = load_weights(model_dir, model, config.device, torch_dtype(config.dtype))
    engine = Engine(model, config, weights, ops=triton_ops)
    for name, path in adapters.items():
        engine.add_adapter(replace(load_packed_adapter(path, engine.geometry), adapter_id=name))
    return engine


def _entry(prompt_ids: list[int], kind: str | None) -> Request:
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    return Request(prompt_ids, params, kind)


def _check(oracle: GreedyOracle, engine: Engine, entries: list[Request]) -> None:
    for entry, text in zip(entries, engine.generate(entries), strict=True):
        expected = oracle.generate(entry.prompt_ids, MAX_TOKENS, entry.adapter_id)
        assert_same_greedy(oracle, entry.prompt_ids, text, expected, entry.adapter_id)
    engine.check_integrity()


def test_mixed_adapters_in_chunks_beside_decodes(files, oracle: GreedyOracle) -> None:
    engine = _engine(files, max_batched_tokens=24, max_inflight_steps=2)
    rng = random.Random(0)
    entries = [
        _entry(rng.choices(range(3, 256), k=length), kind)
        for length, kind in zip((30, 1, 17, 9, 14), (*ADAPTERS, None, "rank4-qv"), strict=True)
    ]
    _check(oracle, engine, entries)


def test_fused_modules_and_heads_turned_in_part(tmp_path: Path) -> None:
    files = _make_files(tmp_path, "phi3", num_hidden_layers=1)
    prompts = [list(range(3 + i, 20 + 5 * i)) for i in range(3)]
    entries = [
        _entry(prompt, kind)
        for prompt, kind in zip(prompts, ("rank4-qv", "rank20-all", None), strict=True)
    ]
    _check(GreedyOracle(*files, ignore_eos=True), _engine(files), entries)


def test_a_shared_prefix(files, oracle: GreedyOracle) -> None:
    engine = _engine(files, num_pool_tokens=640)
    prefix = random.Random(1).choices(range(3, 256), k=36)
    kinds = [None, "rank4-qv", None, "rank4-qv"]
    _check(oracle, engine, [_entry([*prefix, 3 + i], kind) for i, kind in enumerate(kinds)])
    assert engine.stats().num_cached_prompt_tokens >= 2 * 32


def test_a_warm_up_leaves_texts_as_they_are(files, oracle: GreedyOracle) -> None:
    settings = {"max_batched_tokens": 16, "max_running_requests": 1, "graph_max_rank": 16}
    engine = _engine(files, num_pool_tokens=640, **settings)
    compile_kernels(engine.model, engine.config, engine.builder, engine.runner)
    _check(oracle, engine, [_entry(list(range(3, 16)), "rank4-qv")])


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_each_step_are_those_of_the_torch_twins(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Chunks, decodes beside prompts, an eviction and a preemption, on one layer."""
    files = _make_files(tmp_path, num_hidden_layers=1)
    # Three pages are left beside the adapters: too few for what the requests grow to.
    engine = _engine(
        files,
        dtype=dtype_name(dtype),
        num_pool_tokens=16 * 30,
        max_batched_tokens=24,
        admission_output_tokens=0,
    )
    weights = load_weights(files[0], engine.model, DEVICE.type, dtype)
    twin = ModelRunner(engine.model, engine.config, weights, engine.config.num_pages, torch_ops)
    twin_builder = StepBuilder(engine.model, engine.config, twin.attention_planner)
    # Where a string may stop a request, it is admitted though its max_tokens might not fit.
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, stop=("never",))
    rng = random.Random(0)
    lengths = (30, 13, 14, 13, 14)
    for index, kind in enumerate((*ADAPTERS, None, "rank4-qv")):
        prompt = rng.choices(range(3, 256), k=lengths[index])
        engine.add_request(Request(prompt, params, kind))

    num_mixed = 0
    while engine.has_work:
        plan = plan_step(engine)
        num_mixed += len({chunk.is_decode for chunk in plan.chunks}) == 2
        load_adapters(engine, plan, twin_builder, twin)
        actual = engine.runner.logits(engine.builder.build(plan.chunks))
        expected = twin.logits(twin_builder.build(plan.chunks))
        # All logits of a row have errors of one size, whatever their own.
        scale = expected.abs().amax(-1, keepdim=True)
        rtol, _ = TOLERANCES[dtype]
        torch.testing.assert_close(actual / scale, expected / scale, rtol=0.0, atol=rtol)
        engine.scheduler.commit(plan, expected.argmax(-1).tolist())
        engine.check_integrity()
    stats = engine.stats()
    assert num_mixed and stats.num_adapter_evictions and stats.num_preemptions


def test_steps_padded_as_for_graphs_have_the_logits_of_exact_ones(tmp_path: Path) -> None:
    """What graphs are captured with, run without one: chunks, whole prompts, decodes beside."""
    files = _make_files(tmp_path, num_hidden_layers=1)
    engine = _engine(files, max_batched_tokens=24, max_running_requests=6)
    runner, builder = engine.runner, engine.builder
    # As where there are graphs; a runner without runs what it is given.
    builder.shapes.has_graphs = True
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    rng = random.Random(0)
    for index, kind in enumerate((*ADAPTERS, None, "rank4-qv")):
        prompt = rng.choices(range(3, 256), k=(30, 13, 2, 1, 14)[index])
        engine.add_request(Request(prompt, params, kind))

    kinds = set()
    while engine.has_work:
        plan = plan_step(engine)
        inputs = builder.build(plan.chunks)
        shape = inputs.shape
        assert shape.is_padded and shape in set(builder.shapes.graphs())
        padded = runner.logits(inputs)
        expected = runner.logits(builder.build_as(plan.chunks, builder.shapes.of(plan.chunks)))
        torch.testing.assert_close(padded, expected)
        sampling = [chunk.request.table_idx for chunk in plan.chunks if chunk.samples]
        sample_table_idxs = inputs.fields.to(DEVICE)["sample_table_idxs"]
        assert sample_table_idxs[: len(sampling)].tolist() == sampling
        assert inputs.num_samples == len(sampling) <= len(sample_table_idxs) == shape.num_samples
        kinds.add((shape.num_prefills > 0, shape.num_rows))
        engine.scheduler.commit(plan, expected.argmax(-1).tolist())
    assert {(True, 24), (False, 6)} <= kinds
