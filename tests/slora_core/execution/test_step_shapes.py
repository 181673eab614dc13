"""The shape of a step, and that of the graph which holds it, captured at the start."""

import pytest
import torch

from slora_core.adapters.page_layout import AdapterGeometry, plan_layout
from slora_core.attention.planner import AttentionPlanner
from slora_core.config import EngineConfig
from slora_core.execution.buckets import MAX_GRAPH_PROMPTS, LoraShape
from slora_core.execution.step_shapes import StepShapes
from slora_core.models.registry import parse_model_config
from slora_core.requests import Request, RequestState, SamplingParams, ScheduledChunk, StepPlan

MODEL = parse_model_config(
    {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
    },
    {},
)
# Rank and modules of the adapters in the slots.
ADAPTERS = ((4, (0, 2)), (33, (0, 1, 2, 3)), (8, (6,)), (100, (0,)))


def _shapes(**config) -> StepShapes:
    settings = {
        "device": "cuda",
        "num_pool_tokens": 4096,
        "max_running_requests": 64,
        "max_batched_tokens": 512,
    }
    engine = EngineConfig(**settings | config)
    shapes = StepShapes(MODEL, engine, AttentionPlanner(MODEL, torch.float32))
    geometry = AdapterGeometry.of(MODEL, engine)
    for slot, (rank, modules) in enumerate(ADAPTERS):
        keys = [(1, module) for module in modules]
        layout = plan_layout(geometry, dict.fromkeys(keys, rank), dict.fromkeys(keys, 1.0))
        shapes.adapter_loaded(slot, layout)
    return shapes


def _chunks(num_decodes: int, lengths: list[int], slots: list[int]) -> list[ScheduledChunk]:
    """Decodes, then whole prompts of these lengths; their slots in turn."""
    plan = StepPlan()
    for index in range(num_decodes + len(lengths)):
        length = 10 if index < num_decodes else lengths[index - num_decodes]
        state = RequestState(Request([5] * length, SamplingParams()))
        state.num_computed = length - 1 if index < num_decodes else 0
        slot = slots[index % len(slots)]
        state.adapter_slot = None if slot < 0 else slot
        plan.add(state, length)
    plan.sort()
    return plan.chunks


@pytest.mark.parametrize("slots", [[-1], [-1, 0], [0, 1], [2]])
@pytest.mark.parametrize(
    "num_decodes,lengths", [(1, []), (5, []), (64, []), (3, [2]), (0, [1]), (40, [9, 100, 300])]
)
def test_every_small_step_has_a_graph_that_holds_it(
    num_decodes: int, lengths: list[int], slots: list[int]
) -> None:
    shapes = _shapes()
    chunks = _chunks(num_decodes, lengths, slots)
    own, graph = shapes.of(chunks), shapes.graph_of(chunks)
    assert graph is not None and graph in set(shapes.graphs())
    assert graph.is_padded and not own.is_padded
    assert own.num_rows == num_decodes + sum(lengths) <= graph.num_rows
    assert own.num_decodes == num_decodes <= graph.num_decodes
    assert own.num_prefills == len(lengths) <= graph.num_prefills
    assert own.num_samples == len(chunks) <= graph.num_samples
    assert bool(lengths) == (graph.num_prefills > 0)
    is_base = all(chunk.slot < 0 for chunk in chunks)
    assert (own.lora is None) == (graph.lora is None) == is_base
    if own.lora is not None and graph.lora is not None:
        assert own.lora.max_rank <= graph.lora.max_rank
        assert own.lora.modules <= graph.lora.modules


def test_a_decode_for_each_request_that_may_run_and_no_more_logits_than_requests() -> None:
    shapes = _shapes(max_running_requests=8)
    graph = shapes.graph_of(_chunks(1, [15], [-1]))
    assert graph is not None
    assert (graph.num_rows, graph.num_decodes, graph.num_prefills) == (16, 8, 16)
    assert graph.num_samples == 8
    graph = shapes.graph_of(_chunks(1, [400], [-1]))
    assert graph is not None and graph.num_prefills == MAX_GRAPH_PROMPTS


def test_steps_without_a_graph() -> None:
    shapes = _shapes(max_batched_tokens=2048)
    assert shapes.graph_of(_chunks(0, [1024], [-1])) is not None
    assert shapes.graph_of(_chunks(0, [1025], [-1])) is None
    assert shapes.graph_of(_chunks(8, [3] * MAX_GRAPH_PROMPTS, [-1])) is not None
    assert shapes.graph_of(_chunks(8, [3] * (MAX_GRAPH_PROMPTS + 1), [-1])) is None


@pytest.mark.parametrize("config", [{"device": "cpu"}, {"cuda_graphs": False}])
def test_an_engine_without_graphs(config: dict) -> None:
    shapes = _shapes(**config)
    assert not shapes.has_graphs
    assert shapes.graph_of(_chunks(1, [], [-1])) is None


def test_a_rank_above_those_of_the_start_has_a_graph_that_is_not_captured_then() -> None:
    shapes = _shapes(graph_max_rank=64)
    graph = shapes.graph_of(_chunks(2, [], [3]))
    assert graph is not None and graph.lora == LoraShape(128, frozenset(range(4)))
    assert graph not in set(shapes.graphs())
    # Its kernels are compiled then.
    assert {shape.max_rank for shape in shapes.lora_shapes()} == {16, 32, 64, 128, 256}


def test_graphs_are_captured_once_each_and_large_ones_first() -> None:
    graphs = list(_shapes().graphs())
    assert len(set(graphs)) == len(graphs)
    for has_prompts in (True, False):
        rows = [shape.num_rows for shape in graphs if (shape.num_prefills > 0) == has_prompts]
        assert rows == sorted(rows, reverse=True)


def test_what_a_slot_needs_is_that_of_its_last_adapter() -> None:
    shapes = _shapes()
    assert shapes.of(_chunks(1, [], [1])).lora == LoraShape(64, frozenset(range(4)))
    geometry = AdapterGeometry.of(MODEL, EngineConfig())
    layout = plan_layout(geometry, {(0, 6): 2}, {(0, 6): 1.0})
    shapes.adapter_loaded(1, layout)
    assert shapes.of(_chunks(1, [], [1])).lora == LoraShape(16, frozenset({6}))
    # Of adapters that are resident but not in the step nothing counts.
    assert shapes.of(_chunks(2, [], [1, 2])).lora == LoraShape(16, frozenset({6}))
    assert shapes.of(_chunks(2, [], [0, 2])).lora == LoraShape(16, frozenset({0, 2, 6}))
    # What the warm-up uses: a slot without an adapter.
    assert shapes.of(_chunks(1, [], [5])).lora == LoraShape(16, frozenset())


def test_the_torch_twins_take_ranks_as_they_are() -> None:
    shapes = StepShapes(MODEL, EngineConfig(), None)
    geometry = AdapterGeometry.of(MODEL, EngineConfig())
    shapes.adapter_loaded(0, plan_layout(geometry, {(0, 0): 33}, {(0, 0): 1.0}))
    shape = shapes.of(_chunks(1, [5], [0]))
    assert shape.lora == LoraShape(33, frozenset({0})) and shape.prefill_block_rows == 0
