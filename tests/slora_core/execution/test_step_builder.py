"""A plan becomes rows, tables and segments: each tensor against what the plan says."""

import dataclasses
import itertools

import pytest
import torch

from slora_core.adapters.adapter_tables import AdapterTables
from slora_core.adapters.page_layout import AdapterGeometry, plan_layout
from slora_core.attention.planner import AttentionPlanner
from slora_core.config import EngineConfig
from slora_core.execution.batch_views import forward_batch
from slora_core.execution.buckets import LoraShape
from slora_core.execution.int_fields import IntFields
from slora_core.execution.request_tables import RequestTables
from slora_core.execution.sampler import SamplingBatch
from slora_core.execution.step_builder import StepBuilder
from slora_core.execution.step_inputs import StepInputs, StepShape
from slora_core.models.forward_batch import ForwardBatch
from slora_core.models.registry import parse_model_config
from slora_core.requests import Request, RequestState, SamplingParams, StepPlan

PAGE_TOKENS = 4
MAX_PAGES = 5
NUM_REQUESTS = 8
CPU = torch.device("cpu")
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
        "max_position_embeddings": PAGE_TOKENS * MAX_PAGES,
    },
    {},
)


ENGINE = EngineConfig(
    page_tokens=PAGE_TOKENS, num_pool_tokens=32 * PAGE_TOKENS, max_running_requests=NUM_REQUESTS
)
# Ranks of the adapters in the slots, each on the module of its slot's number.
RANKS = (4, 8, 64, 2, 16, 1)


class Steps:
    """A builder, and what the device has of earlier steps when it runs one."""

    def __init__(self, planner: AttentionPlanner | None) -> None:
        self.builder = StepBuilder(MODEL, ENGINE, planner)
        self.requests = RequestTables(NUM_REQUESTS, MAX_PAGES, CPU)
        self.adapters = AdapterTables(torch.zeros(32, 2, 128), 7, max_slots=6, max_pages=8)
        geometry = AdapterGeometry.of(MODEL, ENGINE)
        for slot, rank in enumerate(RANKS):
            layout = plan_layout(geometry, {(0, slot): rank}, {(0, slot): 1.0})
            self.builder.shapes.adapter_loaded(slot, layout)

    def batch(self, plan: StepPlan) -> ForwardBatch:
        return self.batch_of(self.builder.build(plan.chunks))

    def batch_of(self, inputs: StepInputs) -> ForwardBatch:
        views = inputs.fields.to(CPU)
        return forward_batch(views, inputs.shape, self.requests, self.adapters)

    def padded_shape(self, num_rows: int, max_prompts: int, lora: LoraShape | None) -> StepShape:
        """As of a graph, with room for so many prompts."""
        if not max_prompts:
            return StepShape(num_rows, num_rows, 0, lora, is_padded=True)
        planner = AttentionPlanner(MODEL, torch.float32)
        return StepShape(
            num_rows,
            min(num_rows, NUM_REQUESTS),
            max_prompts,
            lora,
            prefill_block_rows=planner.prefill_block_rows([num_rows]),
            is_padded=True,
        )


@pytest.fixture
def steps() -> Steps:
    return Steps(None)


@pytest.fixture
def planned_steps() -> Steps:
    """As for Triton's kernels."""
    return Steps(AttentionPlanner(MODEL, torch.float32))


_indices = itertools.count()


def _request(
    name: str,
    num_prompt: int,
    num_output: int = 0,
    *,
    computed: int = 0,
    pages: list[int],
    slot: int | None = None,
    first_token: int = 100,
    **params,
) -> RequestState:
    ids = list(range(first_token, first_token + num_prompt + num_output))
    request = Request(
        ids[:num_prompt],
        SamplingParams(max_tokens=50, **params),
        adapter_id=None if slot is None else f"adapter-{slot}",
        output_ids=ids[num_prompt:],
        request_id=name,
    )
    return RequestState(
        request,
        num_computed=computed,
        page_ids=pages,
        adapter_slot=slot,
        table_idx=next(_indices) % NUM_REQUESTS,
    )


def _plan(*chunks: tuple[RequestState, int]) -> StepPlan:
    plan = StepPlan()
    for request, end in chunks:
        plan.add(request, end)
    plan.sort()
    return plan


def test_mixed_step(steps: Steps) -> None:
    """Two decodes, a whole prompt, and the middle of a recomputed prompt, on three adapters."""
    decode = _request("decode", 5, 2, computed=6, pages=[9, 3], slot=2, first_token=10)
    base = _request("base", 3, 1, computed=3, pages=[7], first_token=30)
    whole = _request("whole", 6, pages=[1, 0], slot=1, first_token=50)
    middle = _request("middle", 4, 9, computed=2, pages=[20, 4, 11, 2], slot=2, first_token=70)
    plan = _plan((whole, 6), (decode, 7), (middle, 9), (base, 4))
    batch = steps.batch(plan)

    # Decodes by slot (base first), then prefills by slot.
    assert [c.request.request_id for c in plan.chunks] == ["base", "decode", "whole", "middle"]
    assert batch.input_ids.tolist() == [33, 16, *range(50, 56), *range(72, 79)]
    assert batch.positions.tolist() == [3, 6, *range(6), *range(2, 9)]
    # All but the unfinished one sample, at their last row.
    assert batch.logit_rows.tolist() == [0, 1, 7]

    attention = batch.attention
    assert attention.kv_places.tolist() == [
        7 * 4 + 3,
        3 * 4 + 2,
        *[4, 5, 6, 7, 0, 1],
        *[82, 83, 16, 17, 18, 19, 44],
    ]
    assert attention.num_decodes == 2
    assert attention.decode_block_tables[0, :1].tolist() == [7]
    assert attention.decode_block_tables[1, :2].tolist() == [9, 3]
    assert attention.decode_context_lens.tolist() == [4, 7]
    assert attention.query_indptr.tolist() == [2, 8, 15]
    assert attention.prefill_block_tables[0, :2].tolist() == [1, 0]
    assert attention.prefill_block_tables[1, :4].tolist() == [20, 4, 11, 2]
    assert attention.prefill_context_lens.tolist() == [6, 9]

    assert batch.lora is not None
    assert batch.lora.seg_indptr.tolist() == [0, 1, 2, 8, 15]
    assert batch.lora.seg_slots.tolist() == [-1, 2, 1, 2]
    assert batch.lora.max_rank == 64
    assert batch.lora.modules == {1, 2}
    assert batch.lora.tiles is None
    assert attention.decode_plan is None and attention.prefill_plan is None
    assert batch.lora.page_tables is steps.adapters.page_tables

    for tensor in (
        batch.input_ids,
        batch.positions,
        batch.logit_rows,
        attention.kv_places,
        attention.decode_block_tables,
        attention.decode_context_lens,
        attention.query_indptr,
        attention.prefill_block_tables,
        attention.prefill_context_lens,
        batch.lora.seg_indptr,
        batch.lora.seg_slots,
    ):
        assert tensor.dtype == torch.int32


def test_rows_of_one_adapter_are_one_segment_across_the_phases(steps: Steps) -> None:
    decodes = [
        _request(str(i), 2, 1, computed=2, pages=[i], slot=slot) for i, slot in enumerate([3, 0, 3])
    ]
    prefill = _request("prefill", 5, pages=[8, 9], slot=3)
    batch = steps.batch(_plan(*((r, 3) for r in decodes), (prefill, 5)))
    assert batch.lora is not None
    assert batch.lora.seg_slots.tolist() == [0, 3]
    assert batch.lora.seg_indptr.tolist() == [0, 1, 8]
    # Ranks of adapters that are resident but not in the batch do not count.
    assert batch.lora.max_rank == 4


def test_base_only_has_no_segments(steps: Steps) -> None:
    batch = steps.batch(
        _plan((_request("a", 2, 1, computed=2, pages=[1]), 3), (_request("b", 3, pages=[2]), 3))
    )
    assert batch.lora is None


def test_decodes_only_and_prefills_only(steps: Steps) -> None:
    decode = steps.batch(_plan((_request("a", 4, 1, computed=4, pages=[1, 2]), 5))).attention
    assert decode.num_decodes == 1
    assert len(decode.prefill_block_tables) == 0
    assert decode.num_prefills == 0
    # One token at position 0 is a prefill: there is nothing before it.
    prefill = steps.batch(_plan((_request("b", 1, pages=[1]), 1))).attention
    assert prefill.num_decodes == 0
    assert len(prefill.decode_block_tables) == 0
    assert prefill.query_indptr.tolist() == [0, 1]


def test_one_token_of_a_prompt_is_a_decode_row_that_does_not_sample(steps: Steps) -> None:
    batch = steps.batch(_plan((_request("a", 9, computed=4, pages=[5, 6]), 5)))
    assert batch.attention.num_decodes == 1
    assert batch.attention.decode_block_tables[0, :2].tolist() == [5, 6]
    assert batch.logit_rows is not None and batch.logit_rows.tolist() == []


def test_sampling_settings_follow_the_rows_that_sample(steps: Steps) -> None:
    first = _request("first", 2, 3, computed=4, pages=[0, 1], temperature=0.5, top_p=0.9, seed=-7)
    unfinished = _request("unfinished", 9, pages=[2, 3], slot=0, temperature=0.1, seed=1)
    last = _request("last", 4, pages=[4], slot=1, temperature=0.0, top_k=5, min_p=0.25, seed=2**62)
    plan = _plan((last, 4), (unfinished, 8), (first, 5))
    inputs = steps.builder.build(plan.chunks)
    assert inputs.num_samples == 2 and inputs.sampling is not None
    sampling = SamplingBatch.of(inputs.sampling, CPU)
    assert sampling.temperature.tolist() == [0.5, 0.0]
    assert sampling.top_p.tolist() == pytest.approx([0.9, 1.0])
    assert sampling.min_p.tolist() == [0.0, 0.25]
    assert sampling.top_k.tolist() == [0, 5]
    assert sampling.seed.tolist() == [-7, 2**62]
    assert sampling.token_index.tolist() == [3, 0]
    # Only where a token may be cut is anything sorted.
    assert [rows.tolist() for rows in sampling.filtered_rows] == [[0]]
    assert steps.builder.build(_plan((last, 4)).chunks).sampling is None


def test_ends_of_rows_short_of_their_min_tokens_are_masked() -> None:
    model = dataclasses.replace(MODEL, eos_token_ids=(2, 3))
    builder = StepBuilder(model, ENGINE, None)
    free = _request("free", 2, 3, computed=4, pages=[0, 1])
    short = _request("short", 2, 3, computed=4, pages=[2, 3], min_tokens=4, stop_token_ids=(3, 9))
    ignoring = _request(
        "ignoring", 2, 1, computed=2, pages=[4], min_tokens=9, stop_token_ids=(7,), ignore_eos=True
    )
    reached = _request("reached", 2, 3, computed=4, pages=[5, 6], min_tokens=3)
    no_ends = _request("no ends", 2, 1, computed=2, pages=[7], min_tokens=3, ignore_eos=True)
    unfinished = _request("unfinished", 9, pages=[8, 9], min_tokens=5)
    chunks = _plan((free, 5), (short, 5), (ignoring, 3), (reached, 5), (unfinished, 8)).chunks
    masked = builder.build(chunks).masked
    assert masked is not None
    rows = [chunk.request for chunk in chunks if chunk.samples]
    entries = {
        (rows[row].request_id, token_id)
        for row, token_id in zip(masked.rows, masked.token_ids, strict=True)
    }
    assert entries == {("short", 2), ("short", 3), ("short", 9), ("ignoring", 7)}
    assert len(masked.rows) == 4
    assert builder.build(_plan((free, 5), (reached, 5), (no_ends, 3)).chunks).masked is None


def test_a_step_in_which_every_row_samples_needs_no_rows(steps: Steps) -> None:
    decodes = [_request(str(i), 2, 1, computed=2, pages=[i]) for i in range(3)]
    assert steps.batch(_plan(*((r, 3) for r in decodes))).logit_rows is None


def test_a_pending_token_is_the_last_one_of_its_row(steps: Steps) -> None:
    known = _request("known", 3, 1, computed=3, pages=[1], first_token=40)
    pending = _request("pending", 3, computed=3, pages=[2], first_token=50)
    pending.num_pending = 1
    for request, token in ((pending, 77), (known, 88)):
        steps.requests.write_last_tokens(
            torch.tensor([request.table_idx]), torch.tensor([token]).int()
        )
    batch = steps.batch(_plan((known, 4), (pending, 4)))
    assert batch.input_ids.tolist() == [43, 77]


def test_plans_cover_what_triton_runs(planned_steps: Steps) -> None:
    decode = _request("decode", 5, 2, computed=6, pages=[9, 3], slot=2)
    prefill = _request("prefill", 6, pages=[1, 0], slot=1)
    batch = planned_steps.batch(_plan((decode, 7), (prefill, 6)))
    attention = batch.attention
    assert attention.decode_plan is not None and attention.prefill_plan is not None
    assert attention.decode_plan.item_rows[0] == 0
    assert set(attention.decode_plan.item_rows[1:].tolist()) == {-1}
    assert attention.prefill_plan.tile_requests.tolist() == [0]
    assert batch.lora is not None and batch.lora.tiles is not None
    # Ranks come in few sizes there.
    assert batch.lora.max_rank == 64
    covered = set()
    for slot, start, end in zip(
        batch.lora.tiles.slots.tolist(),
        batch.lora.tiles.row_starts.tolist(),
        batch.lora.tiles.row_ends.tolist(),
        strict=True,
    ):
        covered |= {(slot, row) for row in range(start, end)}
    assert covered == {(2, 0), *((1, row) for row in range(1, 7))}


def test_steps_of_one_size_have_one_layout_and_harmless_padding(planned_steps: Steps) -> None:
    lora = LoraShape(16, frozenset(range(7)))
    shape = planned_steps.padded_shape(4, 0, lora)
    nothing = planned_steps.builder.build_as([], shape).fields
    request = _request("one", 2, 1, computed=2, pages=[6], slot=0)
    inputs = planned_steps.builder.build_as(_plan((request, 3)).chunks, shape)
    one = inputs.fields
    assert len(one) == len(nothing)
    views = nothing.views(torch.empty(len(nothing), dtype=torch.int32))
    for name, view in one.to(CPU).items():
        assert view.shape == views[name].shape
        assert one.size(name) == nothing.size(name) == len(view)
    batch = planned_steps.batch_of(inputs)
    assert batch.attention.kv_places.tolist() == [6 * 4 + 2, -1, -1, -1]
    assert batch.attention.decode_context_lens.tolist() == [3, 0, 0, 0]
    assert batch.logit_rows is None
    assert batch.lora is not None and batch.lora.tiles is not None
    assert batch.lora.tiles.slots.tolist() == [0, -1, -1, -1]
    assert planned_steps.requests.block_tables(torch.tensor([request.table_idx]))[0, 0] == 6


def test_decodes_and_prompts_padded_to_a_size(planned_steps: Steps) -> None:
    decode = _request("decode", 5, 2, computed=6, pages=[9, 3], slot=2)
    chunk = _request("chunk", 12, computed=2, pages=[1, 0, 5], slot=1)
    whole = _request("whole", 3, pages=[7], slot=1)
    plan = _plan((decode, 7), (chunk, 5), (whole, 3))
    shape = planned_steps.padded_shape(16, 4, LoraShape(64, frozenset(range(7))))
    # A decode for each running request, and no more logits than requests.
    assert (shape.num_rows, shape.num_decodes, shape.num_prefills) == (16, NUM_REQUESTS, 4)
    inputs = planned_steps.builder.build_as(plan.chunks, shape)
    fields = inputs.fields
    nothing = planned_steps.builder.build_as([], shape).fields
    views = fields.to(CPU)
    assert views.keys() == nothing.to(CPU).keys() and len(fields) == len(nothing)
    assert (inputs.num_samples, inputs.pages) == (2, None)
    # Each request's pages go once.
    again = planned_steps.builder.build_as(plan.chunks, shape).fields
    assert (_num_pages(planned_steps, fields), _num_pages(planned_steps, again)) == (6, 0)

    batch = planned_steps.batch_of(inputs)
    attention = batch.attention
    assert attention.kv_places.tolist() == [14, 6, 7, 0, 28, 29, 30, *[-1] * 9]
    assert attention.decode_context_lens.tolist() == [7, *[0] * 7]
    assert attention.query_indptr.tolist() == [1, 4, 7, 7, 7]
    assert attention.prefill_context_lens.tolist() == [5, 3, 0, 0]
    assert [table[0] for table in attention.prefill_block_tables[:2].tolist()] == [1, 7]
    assert attention.decode_plan is not None and attention.prefill_plan is not None
    assert [row for row in attention.decode_plan.item_rows.tolist() if row >= 0] == [0]
    tiles = attention.prefill_plan.tile_requests.tolist()
    assert sorted(tiles, reverse=True) == [1, 0, *[-1] * (len(tiles) - 2)]
    assert batch.lora is not None and batch.lora.tiles is not None
    assert batch.lora.seg_indptr.tolist() == [0, 1, *[7] * 15]
    assert batch.lora.tiles.slots.tolist() == [2, *[1] * 6, *[-1] * 9]
    # The chunk's rows are sampled by no request.
    assert batch.logit_rows is not None
    assert batch.logit_rows.tolist() == [0, 6, *[0] * (NUM_REQUESTS - 2)]
    assert views["sample_table_idxs"].tolist()[:2] == [decode.table_idx, whole.table_idx]


def test_chunks_of_any_lengths_have_room_in_a_padded_step(planned_steps: Steps) -> None:
    shape = planned_steps.padded_shape(64, NUM_REQUESTS, None)
    nothing = planned_steps.builder.build_as([], shape).fields
    for lengths in ([64], [57, *[1] * 7], [8] * 8, [33, 31], [17, 17, 17, 13], [2, 3, 5, 7, 11]):
        chunks = [
            (_request(str(i), length, pages=[i] * -(-length // PAGE_TOKENS)), length)
            for i, length in enumerate(lengths)
        ]
        inputs = planned_steps.builder.build_as(_plan(*chunks).chunks, shape)
        assert len(inputs.fields) == len(nothing)


def test_more_new_pages_than_rows_go_before_a_padded_step(planned_steps: Steps) -> None:
    """A prompt whose beginning is cached brings more pages than it has rows."""
    shape = planned_steps.padded_shape(2, 1, None)
    cached = _request("cached", 18, computed=16, pages=[9, 3, 4, 7, 1])
    plan = _plan((cached, 18))
    inputs = planned_steps.builder.build_as(plan.chunks, shape)
    assert inputs.pages is not None and inputs.pages.size("table_pages") == 5
    assert _num_pages(planned_steps, inputs.fields) == 0
    planned_steps.requests.write_pages(*inputs.pages.to(CPU).values())
    batch = planned_steps.batch_of(inputs)
    assert batch.attention.prefill_block_tables[0].tolist() == [9, 3, 4, 7, 1]
    assert len(inputs.fields) == len(planned_steps.builder.build_as([], shape).fields)
    # A step of its own size has room.
    taken_over = _request("taken over", 18, computed=16, pages=[9, 3, 4, 7, 1])
    inputs = planned_steps.builder.build(_plan((taken_over, 18)).chunks)
    assert inputs.pages is None and _num_pages(planned_steps, inputs.fields) == 5


def test_running_a_step_leaves_its_inputs_as_they_are(steps: Steps) -> None:
    """Another rank runs the same ones."""
    pending = _request("pending", 3, computed=3, pages=[2], first_token=50)
    pending.num_pending = 1
    inputs = steps.builder.build(_plan((pending, 4)).chunks)
    for token in (77, 88):
        steps.requests.write_last_tokens(
            torch.tensor([pending.table_idx]), torch.tensor([token]).int()
        )
        assert steps.batch_of(inputs).input_ids.tolist() == [token]


def _num_pages(steps: Steps, fields: IntFields) -> int:
    """Page ids that a step brings, padding aside."""
    padding = steps.builder._sent.padding_entry
    return sum(entry != padding for entry in fields.to(CPU)["table_entries"].tolist())
