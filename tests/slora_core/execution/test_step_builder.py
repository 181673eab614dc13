"""A plan becomes rows, tables and segments: each tensor against what the plan says."""

import itertools

import pytest
import torch

from slora_core.adapters.adapter_tables import DeviceAdapterTables
from slora_core.attention.planner import AttentionPlanner
from slora_core.execution.buckets import LoraShape
from slora_core.execution.row_state import RowState
from slora_core.execution.step_builder import BatchBuilder
from slora_core.models.forward_batch import ForwardBatch
from slora_core.models.registry import parse_model_config
from slora_core.requests import Request, SamplingParams, StepPlan

PAGE_TOKENS = 4
MAX_PAGES = 5
NUM_ROWS = 8
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


class Builder(BatchBuilder):
    """A builder for the CPU, with the row state that it reads."""

    def __init__(self, tables: DeviceAdapterTables, planner: AttentionPlanner | None) -> None:
        self.rows = RowState(NUM_ROWS, MAX_PAGES, CPU)
        super().__init__(PAGE_TOKENS, tables, self.rows, planner)

    def build(self, plan: StepPlan) -> ForwardBatch:
        shape = self.shape(plan.chunks)
        return self.forward_batch(self.fields(plan.chunks, shape).to(CPU), shape)


@pytest.fixture
def tables() -> DeviceAdapterTables:
    tables = DeviceAdapterTables(torch.zeros(32, 2, 128), 7, max_slots=6, max_pages=8)
    tables.max_ranks = [4, 8, 64, 2, 16, 1]
    tables.modules = [frozenset({slot}) for slot in range(6)]
    return tables


@pytest.fixture
def builder(tables: DeviceAdapterTables) -> Builder:
    return Builder(tables, None)


@pytest.fixture
def planning_builder(tables: DeviceAdapterTables) -> Builder:
    """As for Triton's kernels."""
    return Builder(tables, AttentionPlanner(MODEL, torch.float32))


_rows = itertools.count()


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
) -> Request:
    ids = list(range(first_token, first_token + num_prompt + num_output))
    return Request(
        name,
        ids[:num_prompt],
        SamplingParams(max_tokens=50, **params),
        adapter_id=None if slot is None else f"adapter-{slot}",
        output_ids=ids[num_prompt:],
        num_computed=computed,
        page_ids=pages,
        adapter_slot=slot,
        row=next(_rows) % NUM_ROWS,
    )


def _plan(*chunks: tuple[Request, int]) -> StepPlan:
    plan = StepPlan()
    for request, end in chunks:
        plan.add(request, end)
    plan.sort()
    return plan


def test_mixed_step(builder: Builder, tables: DeviceAdapterTables) -> None:
    """Two decodes, a whole prompt, and the middle of a recomputed prompt, on three adapters."""
    decode = _request("decode", 5, 2, computed=6, pages=[9, 3], slot=2, first_token=10)
    base = _request("base", 3, 1, computed=3, pages=[7], first_token=30)
    whole = _request("whole", 6, pages=[1, 0], slot=1, first_token=50)
    middle = _request("middle", 4, 9, computed=2, pages=[20, 4, 11, 2], slot=2, first_token=70)
    plan = _plan((whole, 6), (decode, 7), (middle, 9), (base, 4))
    batch = builder.build(plan)

    # Decodes by slot (base first), then prefills by slot.
    assert [c.request.request_id for c in plan.chunks] == ["base", "decode", "whole", "middle"]
    assert batch.input_ids.tolist() == [33, 16, *range(50, 56), *range(72, 79)]
    assert batch.positions.tolist() == [3, 6, *range(6), *range(2, 9)]
    # All but the unfinished one sample, at their last row.
    assert batch.logit_rows.tolist() == [0, 1, 7]

    attention = batch.attention
    assert attention.slot_mapping.tolist() == [
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
    assert batch.lora.page_tables is tables.page_tables

    for tensor in (
        batch.input_ids,
        batch.positions,
        batch.logit_rows,
        attention.slot_mapping,
        attention.decode_block_tables,
        attention.decode_context_lens,
        attention.query_indptr,
        attention.prefill_block_tables,
        attention.prefill_context_lens,
        batch.lora.seg_indptr,
        batch.lora.seg_slots,
    ):
        assert tensor.dtype == torch.int32


def test_rows_of_one_adapter_are_one_segment_across_the_phases(builder: Builder) -> None:
    decodes = [
        _request(str(i), 2, 1, computed=2, pages=[i], slot=slot) for i, slot in enumerate([3, 0, 3])
    ]
    prefill = _request("prefill", 5, pages=[8, 9], slot=3)
    batch = builder.build(_plan(*((r, 3) for r in decodes), (prefill, 5)))
    assert batch.lora is not None
    assert batch.lora.seg_slots.tolist() == [0, 3]
    assert batch.lora.seg_indptr.tolist() == [0, 1, 8]
    # Ranks of adapters that are resident but not in the batch do not count.
    assert batch.lora.max_rank == 4


def test_base_only_has_no_segments(builder: Builder) -> None:
    batch = builder.build(
        _plan((_request("a", 2, 1, computed=2, pages=[1]), 3), (_request("b", 3, pages=[2]), 3))
    )
    assert batch.lora is None


def test_decodes_only_and_prefills_only(builder: Builder) -> None:
    decode = builder.build(_plan((_request("a", 4, 1, computed=4, pages=[1, 2]), 5))).attention
    assert decode.num_decodes == 1
    assert len(decode.prefill_block_tables) == 0
    assert decode.num_prefills == 0
    # One token at position 0 is a prefill: there is nothing before it.
    prefill = builder.build(_plan((_request("b", 1, pages=[1]), 1))).attention
    assert prefill.num_decodes == 0
    assert len(prefill.decode_block_tables) == 0
    assert prefill.query_indptr.tolist() == [0, 1]


def test_one_token_of_a_prompt_is_a_decode_row_that_does_not_sample(builder: Builder) -> None:
    batch = builder.build(_plan((_request("a", 9, computed=4, pages=[5, 6]), 5)))
    assert batch.attention.num_decodes == 1
    assert batch.attention.decode_block_tables[0, :2].tolist() == [5, 6]
    assert batch.logit_rows is not None and batch.logit_rows.tolist() == []


def test_sampling_settings_follow_the_rows_that_sample(builder: Builder) -> None:
    first = _request("first", 2, 3, computed=4, pages=[0, 1], temperature=0.5, top_p=0.9, seed=-7)
    unfinished = _request("unfinished", 9, pages=[2, 3], slot=0, temperature=0.1, seed=1)
    last = _request("last", 4, pages=[4], slot=1, temperature=0.0, top_k=5, min_p=0.25, seed=2**62)
    plan = _plan((last, 4), (unfinished, 8), (first, 5))
    sampling = builder.sampling([chunk for chunk in plan.chunks if chunk.samples])
    assert sampling is not None
    assert sampling.temperature.tolist() == [0.5, 0.0]
    assert sampling.top_p.tolist() == pytest.approx([0.9, 1.0])
    assert sampling.min_p.tolist() == [0.0, 0.25]
    assert sampling.top_k.tolist() == [0, 5]
    assert sampling.seed.tolist() == [-7, 2**62]
    assert sampling.token_index.tolist() == [3, 0]
    # Only where a token may be cut is anything sorted.
    assert sampling.filtered_rows.tolist() == [0]
    assert builder.sampling(_plan((last, 4)).chunks) is None


def test_a_step_in_which_every_row_samples_needs_no_rows(builder: Builder) -> None:
    decodes = [_request(str(i), 2, 1, computed=2, pages=[i]) for i in range(3)]
    assert builder.build(_plan(*((r, 3) for r in decodes))).logit_rows is None


def test_a_pending_token_is_the_last_one_of_its_row(builder: Builder) -> None:
    known = _request("known", 3, 1, computed=3, pages=[1], first_token=40)
    pending = _request("pending", 3, computed=3, pages=[2], first_token=50)
    pending.num_pending = 1
    builder.rows.write_last_tokens(torch.tensor([pending.row]), torch.tensor([77]).int())
    builder.rows.write_last_tokens(torch.tensor([known.row]), torch.tensor([88]).int())
    batch = builder.build(_plan((known, 4), (pending, 4)))
    assert batch.input_ids.tolist() == [43, 77]


def test_plans_cover_what_triton_runs(planning_builder: Builder) -> None:
    decode = _request("decode", 5, 2, computed=6, pages=[9, 3], slot=2)
    prefill = _request("prefill", 6, pages=[1, 0], slot=1)
    batch = planning_builder.build(_plan((decode, 7), (prefill, 6)))
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


def test_steps_of_one_size_have_one_layout_and_harmless_padding(planning_builder: Builder) -> None:
    lora = LoraShape(16, frozenset(range(7)))
    shape = planning_builder.padded_shape(4, 0, lora)
    nothing = planning_builder.fields([], shape)
    request = _request("one", 2, 1, computed=2, pages=[6], slot=0)
    one = planning_builder.fields(_plan((request, 3)).chunks, shape)
    assert len(one) == len(nothing)
    views = nothing.views(torch.empty(len(nothing), dtype=torch.int32))
    for name, view in one.to(CPU).items():
        assert view.shape == views[name].shape
    batch = planning_builder.forward_batch(one.to(CPU), shape)
    assert batch.attention.slot_mapping.tolist() == [6 * 4 + 2, -1, -1, -1]
    assert batch.attention.decode_context_lens.tolist() == [3, 0, 0, 0]
    assert batch.logit_rows is None
    assert batch.lora is not None and batch.lora.tiles is not None
    assert batch.lora.tiles.slots.tolist() == [0, -1, -1, -1]
    assert planning_builder.rows.block_tables(torch.tensor([request.row]))[0, 0] == 6


def test_decodes_and_prompts_padded_to_a_size(planning_builder: Builder) -> None:
    decode = _request("decode", 5, 2, computed=6, pages=[9, 3], slot=2)
    chunk = _request("chunk", 12, computed=2, pages=[1, 0, 5], slot=1)
    whole = _request("whole", 3, pages=[7], slot=1)
    plan = _plan((decode, 7), (chunk, 5), (whole, 3))
    assert planning_builder.rows.num_new_pages(plan.chunks) == 6
    shape = planning_builder.padded_shape(16, 4, LoraShape(64, frozenset(range(7))))
    # A decode for each running request, and no more logits than requests.
    assert (shape.num_rows, shape.num_decodes, shape.num_prefills) == (16, NUM_ROWS, 4)
    fields = planning_builder.fields(plan.chunks, shape)
    nothing = planning_builder.fields([], shape)
    views = fields.to(CPU)
    assert views.keys() == nothing.to(CPU).keys() and len(fields) == len(nothing)
    # Each request's pages go once.
    assert planning_builder.rows.num_new_pages(plan.chunks) == 0

    batch = planning_builder.forward_batch(views, shape)
    attention = batch.attention
    assert attention.slot_mapping.tolist() == [14, 6, 7, 0, 28, 29, 30, *[-1] * 9]
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
    assert batch.logit_rows.tolist() == [0, 6, *[0] * (NUM_ROWS - 2)]
    assert views["sample_rows"].tolist()[:2] == [decode.row, whole.row]


def test_chunks_of_any_lengths_have_room_in_a_padded_step(planning_builder: Builder) -> None:
    shape = planning_builder.padded_shape(64, NUM_ROWS, None)
    nothing = planning_builder.fields([], shape)
    for lengths in ([64], [57, *[1] * 7], [8] * 8, [33, 31], [17, 17, 17, 13], [2, 3, 5, 7, 11]):
        chunks = [
            (_request(str(i), length, pages=[i] * -(-length // PAGE_TOKENS)), length)
            for i, length in enumerate(lengths)
        ]
        assert len(planning_builder.fields(_plan(*chunks).chunks, shape)) == len(nothing)
