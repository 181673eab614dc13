"""Names the device copies of a step's fields: the tensors of a `ForwardBatch`.

Runs on the device's side of every rank. Everything here may be captured in a CUDA graph, which then
owns the copies.
"""

from collections.abc import Mapping

import torch

from kernels.attention_plan import DecodePlan, PrefillPlan
from kernels.lora_segments import TILE_FIELDS, LoraSegments, LoraTiles
from slora_core.adapters.adapter_tables import AdapterTables
from slora_core.attention.batch import AttentionBatch
from slora_core.execution.buckets import LoraShape
from slora_core.execution.request_tables import RequestTables
from slora_core.execution.step_inputs import StepShape
from slora_core.models.forward_batch import ForwardBatch

Views = Mapping[str, torch.Tensor]


def forward_batch(
    views: Views, shape: StepShape, requests: RequestTables, adapters: AdapterTables
) -> ForwardBatch:
    """The batch of a step; also brings the device's block tables up to date."""
    requests.write_pages(views["table_entries"], views["table_pages"])
    input_ids = views["input_ids"]
    if shape.num_decodes:
        # A token that the host has not read yet is the last one sampled for its request.
        known = input_ids[: shape.num_decodes]
        last = requests.last_tokens.index_select(0, views["decode_table_idxs"])
        known.copy_(torch.where(known < 0, last, known))
    return ForwardBatch(
        input_ids=input_ids,
        positions=views["positions"],
        attention=_attention(views, shape, requests),
        lora=None if shape.lora is None else _segments(views, shape, shape.lora, adapters),
        logit_rows=views.get("logit_rows"),
    )


def _attention(views: Views, shape: StepShape, requests: RequestTables) -> AttentionBatch:
    return AttentionBatch(
        kv_places=views["kv_places"],
        num_decodes=shape.num_decodes,
        decode_block_tables=requests.block_tables(views["decode_table_idxs"]),
        decode_context_lens=views["decode_context_lens"],
        query_indptr=views["query_indptr"],
        prefill_block_tables=requests.block_tables(views["prefill_table_idxs"]),
        prefill_context_lens=views["prefill_context_lens"],
        decode_plan=_decode_plan(views),
        prefill_plan=_prefill_plan(views, shape.prefill_block_rows),
    )


def _decode_plan(views: Views) -> DecodePlan | None:
    if "item_rows" not in views:
        return None
    return DecodePlan(
        views["item_rows"], views["item_starts"], views["row_items"], views["chunk_tokens"]
    )


def _prefill_plan(views: Views, block_rows: int) -> PrefillPlan | None:
    if "query_tile_requests" not in views:
        return None
    return PrefillPlan(views["query_tile_requests"], views["query_tile_starts"], block_rows)


def _segments(
    views: Views, shape: StepShape, lora: LoraShape, adapters: AdapterTables
) -> LoraSegments:
    tiles = None
    if "tile_" + TILE_FIELDS[0] in views:
        slots, row_starts, row_ends, shares, num_shares = (
            views["tile_" + name] for name in TILE_FIELDS
        )
        tiles = LoraTiles(slots, row_starts, row_ends, shares, num_shares, shape.lora_block_rows)
    return LoraSegments(
        seg_indptr=views["seg_indptr"],
        seg_slots=views["seg_slots"],
        page_tables=adapters.page_tables,
        offsets=adapters.offsets,
        scaling=adapters.scaling,
        max_rank=lora.max_rank,
        modules=lora.modules,
        tiles=tiles,
    )
