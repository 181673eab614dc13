"""The engine on a GPU: graphs, overlap, eviction and the profiled pool change no text.

fp32 unless said otherwise, so that texts can be compared with transformers and PEFT.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.errors import UnsupportedModelError
from slora_core.execution import step_shapes
from slora_core.execution.int_fields import IntFields
from slora_core.execution.memory_profile import _costliest_sampling, _sampling_bytes
from slora_core.execution.sampler import SamplingBatch, sample
from slora_core.execution.step_handle import StepHandle
from slora_core.execution.step_inputs import StepInputs, StepShape
from slora_core.models.registry import load_model_config
from slora_core.models.weights import dummy_weights
from slora_core.requests import Request, SamplingParams
from tests.factories import (
    ALL_MODULES,
    family_options,
    make_adapter,
    make_model,
    make_random_adapter,
)
from tests.gpu.cases import ADAPTERS, KINDS, SMALL_KINDS, check, make_entries
from tests.on_gpu import needs_gpu
from tests.oracle import GreedyOracle, assert_same_greedy

pytestmark = needs_gpu


@pytest.mark.parametrize("inflight", [1, 2])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_texts(make_engine, oracle: GreedyOracle, cuda_graphs: bool, inflight: int) -> None:
    engine = make_engine(cuda_graphs=cuda_graphs, max_inflight_steps=inflight)
    # The rank of the last adapter has no graphs at start.
    check(oracle, engine, make_entries(30))
    # And each alone.
    for entry in make_entries(len(KINDS), seed=1):
        check(oracle, engine, [entry])


def test_fused_modules_and_heads_turned_in_part(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path / "model", "phi3", seed=3)
    adapters = {
        kind: make_adapter(
            tmp_path / kind, model_dir, seed=index, **family_options("phi3", ADAPTERS[kind])
        )
        for index, kind in enumerate(("rank4-qv", "rank16-all"))
    }
    config = EngineConfig("cuda", num_pool_tokens=8192, max_running_requests=16)
    engine = Engine.from_pretrained(model_dir, config)
    for name, path in adapters.items():
        engine.add_adapter(replace(load_packed_adapter(path, engine.geometry), adapter_id=name))
    oracle = GreedyOracle(model_dir, adapters, ignore_eos=True)
    check(oracle, engine, make_entries(20, seed=6, kinds=(None, *adapters)))


def test_prompts_in_graphs_and_in_kernels_of_their_own(make_engine, oracle, monkeypatch) -> None:
    engine = make_engine(max_inflight_steps=2, prefix_caching=False)
    replayed: list[StepShape] = []
    replay = engine.runner._graphs.replay

    def count(shape: StepShape, fields: IntFields) -> torch.Tensor:
        replayed.append(shape)
        return replay(shape, fields)

    monkeypatch.setattr(engine.runner._graphs, "replay", count)
    # Others have no graph before one is captured for them.
    entries = make_entries(20, seed=2, kinds=SMALL_KINDS)
    check(oracle, engine, entries)
    assert any(shape.num_prefills for shape in replayed)
    replayed.clear()
    # No prompts have room in a graph.
    monkeypatch.setattr(step_shapes, "MAX_GRAPH_PROMPTS", -1)
    check(oracle, engine, entries)
    assert replayed and not any(shape.num_prefills for shape in replayed)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_nothing_ends_a_text_before_its_min_tokens(make_engine, cuda_graphs, temperature) -> None:
    engine = make_engine(cuda_graphs=cuda_graphs, max_inflight_steps=2)

    def texts(**params) -> list[list[int]]:
        sampling = SamplingParams(max_tokens=12, temperature=temperature, ignore_eos=True, **params)
        return engine.generate([Request([5, 6, 7 + i], sampling, kind) for i, kind in cases])

    cases = list(enumerate((None, "rank4-qv", "rank16-all")))
    free = texts()
    ends = tuple({text[0] for text in free} | {text[2] for text in free})
    assert [len(text) for text in texts(stop_token_ids=ends)] == [1, 1, 1]
    # The masks of one request are in the rows of no other, nor in those of later steps.
    for text in texts(stop_token_ids=ends, min_tokens=6):
        assert len(text) > 6 and not set(ends) & set(text[:6])
    assert texts() == free


def test_shared_prefixes(make_engine, oracle: GreedyOracle) -> None:
    engine = make_engine(max_inflight_steps=2)
    prefix = random.Random(5).choices(range(3, 256), k=100)
    entries = [
        replace(e, prompt_ids=[*prefix, *e.prompt_ids[:9]]) for e in make_entries(20, seed=3)
    ]
    for _ in range(2):
        check(oracle, engine, entries)
    # Of each kind all but the first find the prefix, then all do.
    assert engine.stats().num_cached_prompt_tokens >= 96 * (20 - len(KINDS)) + 96 * 20


def test_a_cached_prefix_of_more_pages_than_rows_is_replayed(
    make_engine, oracle: GreedyOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_inflight_steps=2)
    prefix = random.Random(5).choices(range(3, 256), k=400)
    entries = [
        replace(e, prompt_ids=[*prefix, *e.prompt_ids[:2]])
        for e in make_entries(6, seed=3, kinds=SMALL_KINDS, max_tokens=4)
    ]
    check(oracle, engine, entries)
    sent: list[int] = []
    run = engine.runner.run

    def count(inputs: StepInputs) -> StepHandle:
        if inputs.pages is not None:
            sent.append(inputs.pages.size("table_pages"))
        return run(inputs)

    def fail(*_: object) -> torch.Tensor:
        raise AssertionError("a step was launched kernel by kernel")

    monkeypatch.setattr(engine.runner, "run", count)
    monkeypatch.setattr(engine.runner, "_forward", fail)
    check(oracle, engine, entries)
    assert sum(sent) >= 25 * len(entries)


def test_evicted_adapters_and_preempted_requests(make_engine, oracle: GreedyOracle) -> None:
    adapters = {kind: oracle.adapters[kind] for kind in SMALL_KINDS if kind is not None}
    engine = make_engine(
        adapters, num_pool_tokens=800, admission_output_tokens=1, max_inflight_steps=2
    )
    # Where a string may stop a request, it is admitted though its max_tokens might not fit.
    check(oracle, engine, make_entries(40, seed=4, kinds=SMALL_KINDS, stop=("never",)))
    stats = engine.stats()
    assert stats.num_adapter_evictions > 0 and stats.num_preemptions > 0


def test_sixty_adapters_loaded_again_and_again(make_engine, model_dir: Path, tmp_path) -> None:
    """The truth is the engine on the CPU, with room for all of them."""
    ranks = (1, 4, 8, 16, 24, 64)
    paths = {
        f"adapter-{i}": make_random_adapter(
            tmp_path / str(i),
            model_dir,
            seed=i,
            rank=ranks[i % len(ranks)],
            target_modules=ALL_MODULES if i % 4 == 0 else ("q_proj", "v_proj"),
            scale=0.08,
        )
        for i in range(60)
    }
    oracle = GreedyOracle(model_dir, paths, ignore_eos=True)
    entries = make_entries(120, seed=8, kinds=tuple(paths))
    expected = make_engine(paths, device="cpu", num_pool_tokens=16384).generate(entries)
    assert len({tuple(text[:5]) for text in expected}) > 60
    engine = make_engine(paths, num_pool_tokens=2400, max_inflight_steps=2)
    for _ in range(2):
        for entry, text, truth in zip(entries, engine.generate(entries), expected, strict=True):
            assert_same_greedy(oracle, entry.prompt_ids, text, truth, entry.adapter_id)
        engine.check_integrity()
    assert engine.stats().num_adapter_loads > 2 * len(paths)


def test_seeds_sample_the_same_text_eagerly_in_graphs_and_on_the_cpu(make_engine) -> None:
    entries = make_entries(10, temperature=0.8, top_k=40, top_p=0.9, seed=7)
    texts = [
        make_engine(cuda_graphs=graphs, max_inflight_steps=inflight).generate(entries)
        for graphs, inflight in ((False, 1), (True, 1), (True, 2))
    ]
    assert texts[0] == texts[1] == texts[2]
    # The last bits of the logits are others on the CPU, and may move a border across a random
    # number: in one text, not in two.
    on_cpu = make_engine(device="cpu").generate(entries)
    assert sum(a == b for a, b in zip(texts[0], on_cpu, strict=True)) >= len(entries) - 1


def test_the_pool_takes_what_memory_leaves(model_dir: Path) -> None:
    free, total = torch.cuda.mem_get_info()
    share = 1 - free / total + 0.05
    config = EngineConfig(device="cuda", num_pool_tokens=None, memory_utilization=share)
    engine = Engine.from_pretrained(model_dir, config)
    used = total - torch.cuda.mem_get_info()[0]
    assert 0.02 * total < used - (total - free) < 0.06 * total
    assert list(engine.startup_s) == ["weights", "profile", "pool", "kernels", "graphs"]
    [text] = engine.generate([Request([5, 6, 7], SamplingParams(ignore_eos=True))])
    assert len(text) == 16


def test_sampling_takes_no_more_than_the_profile_reserves(model_dir: Path) -> None:
    rows, vocab = 256, 32_000
    model = replace(load_model_config(model_dir), vocab_size=vocab)
    config = EngineConfig(device="cuda", dtype="bfloat16", max_running_requests=rows)
    logits = torch.randn(rows, vocab, device="cuda")
    reserved = _sampling_bytes(model, config)
    # Twice the rows have twice the logits; what else there is a block takes, whatever the rows.
    twice = _sampling_bytes(model, replace(config, max_running_requests=2 * rows))
    assert reserved > 2 * logits.nbytes and twice - reserved < 1.1 * logits.nbytes
    for num_filtered in (0, 100, rows):
        sampling = replace(_costliest_sampling(rows), filtered_rows=list(range(num_filtered)))
        batch = SamplingBatch.of(sampling, logits.device)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        sample(logits, batch)
        taken = torch.cuda.max_memory_allocated() - before
        assert logits.nbytes + taken <= reserved * 1.01


def test_no_memory_left_for_the_pool(model_dir: Path) -> None:
    model = load_model_config(model_dir)
    config = EngineConfig(device="cuda", num_pool_tokens=None, memory_utilization=0.001)
    with pytest.raises(UnsupportedModelError, match="leaves no memory for the pool"):
        Engine(model, config, dummy_weights(model, "cuda", torch.float32))
