"""Turns a `StepPlan` into the tensors of a `ForwardBatch`.

Rows keep the plan's order: decodes first, each part ordered by adapter, so that an adapter is one
segment of decode rows and one of prefill rows. Decides nothing. `fields` makes the numbers on the
host, `forward_batch` names their device copies, so that a CUDA graph can own the latter.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kernels.attention_plan import DecodePlan, PrefillPlan
from kernels.lora_segments import (
    DECODE_BLOCK_ROWS,
    TILE_FIELDS,
    UNUSED_TILE,
    LoraSegments,
    LoraTiles,
    choose_block_rows,
    plan_tiles,
)
from slora_core.adapters.adapter_tables import DeviceAdapterTables
from slora_core.attention.batch import AttentionBatch
from slora_core.attention.planner import AttentionPlanner
from slora_core.execution.buckets import RANK_BUCKETS, LoraShape, bucket_of
from slora_core.execution.chunks import is_plain_decode, logit_rows, slot_runs
from slora_core.execution.int_fields import IntFields
from slora_core.execution.row_state import RowState
from slora_core.execution.sampler import SamplingBatch
from slora_core.models.forward_batch import ForwardBatch
from slora_core.requests import ScheduledChunk


@dataclass(frozen=True)
class BatchShape:
    """What decides which kernels run a step, and how, beside the numbers in its fields."""

    # Of one step, or what a padded one has room for.
    num_rows: int
    num_decodes: int
    num_prefills: int
    # None where all rows are the base model's.
    lora: LoraShape | None
    # Rows of a LoRA tile.
    lora_block_rows: int = DECODE_BLOCK_ROWS
    # Packed query rows of a tile of the prefills' attention; 0 where it is not planned.
    prefill_block_rows: int = 0
    # Whether fields are padded, so that all steps of the shape have one layout: that of a graph.
    is_padded: bool = False

    @property
    def num_samples(self) -> int:
        """Rows that sample, at most; a padded step has a decode for each request that may run."""
        return self.num_decodes if self.is_padded else self.num_decodes + self.num_prefills

    def padded(self, size: int) -> int | None:
        """Size of a field of at most `size` values; None: as many as the step has."""
        return size if self.is_padded else None


class BatchBuilder:
    """Args:
    planner: makes the plans that Triton's kernels run by; None where the torch twins run.
    """

    def __init__(
        self,
        page_tokens: int,
        tables: DeviceAdapterTables,
        rows: RowState,
        planner: AttentionPlanner | None,
    ) -> None:
        self._page_tokens = page_tokens
        self._tables = tables
        self._rows = rows
        self._planner = planner

    def shape(self, chunks: Sequence[ScheduledChunk]) -> BatchShape:
        """The shape of a plan's chunks."""
        num_decodes = sum(chunk.is_decode for chunk in chunks)
        lora = self.lora_shape(chunks)
        if num_decodes == len(chunks):
            return BatchShape(num_decodes, num_decodes, 0, lora)
        chunk_lens = [chunk.end - chunk.start for chunk in chunks]
        bounds, slots = slot_runs(chunks)
        prefill_rows = 0
        if self._planner is not None:
            prefill_rows = self._planner.prefill_block_rows(chunk_lens[num_decodes:])
        return BatchShape(
            bounds[-1],
            num_decodes,
            len(chunks) - num_decodes,
            lora,
            choose_block_rows(bounds[-1], len(slots)),
            prefill_rows,
        )

    def lora_shape(self, chunks: Sequence[ScheduledChunk]) -> LoraShape | None:
        """What the chunks' adapters need; None where all use the base model."""
        slots = {chunk.slot for chunk in chunks} - {-1}
        if not slots:
            return None
        max_rank = max(self._tables.max_ranks[slot] for slot in slots)
        if self._planner is not None:
            # Few values, for each of which kernels are compiled.
            max_rank = bucket_of(max_rank, RANK_BUCKETS)
        modules = frozenset().union(*(self._tables.modules[slot] for slot in slots))
        return LoraShape(max_rank, modules)

    def padded_shape(self, num_rows: int, max_prompts: int, lora: LoraShape | None) -> BatchShape:
        """What a CUDA graph of so many rows is captured for; with `max_prompts` 0, of decodes."""
        if not max_prompts:
            return BatchShape(num_rows, num_rows, 0, lora, is_padded=True)
        prefill_rows = 0
        if self._planner is not None:
            prefill_rows = self._planner.prefill_block_rows([num_rows])
        return BatchShape(
            num_rows,
            min(num_rows, self._rows.num_rows),
            min(num_rows, max_prompts),
            lora,
            prefill_block_rows=prefill_rows,
            is_padded=True,
        )

    def fields(self, chunks: Sequence[ScheduledChunk], shape: BatchShape) -> IntFields:
        """The numbers of one step.

        Args:
            chunks: of the plan, sorted.
            shape: the plan's, or a padded one with room for it. Padding rows write nothing that is
                read, and what is sampled for them is garbage.
        """
        fields = IntFields()
        self._add_rows(fields, chunks, shape)
        self._add_attention(fields, chunks, shape)
        if shape.lora is not None:
            self._add_lora(fields, chunks, shape)
        self._add_samples(fields, chunks, shape)
        return fields

    def forward_batch(self, views: Mapping[str, torch.Tensor], shape: BatchShape) -> ForwardBatch:
        """Name the device copies of `fields`; also brings the device's block tables up to date.

        Everything here may be captured in a CUDA graph.
        """
        self._rows.write_pages(views["table_entries"], views["table_pages"])
        input_ids = views["input_ids"]
        if shape.num_decodes:
            # A token that the host has not read yet is the last one sampled for its row.
            known = input_ids[: shape.num_decodes]
            last = self._rows.last_tokens.index_select(0, views["decode_rows"])
            known.copy_(torch.where(known < 0, last, known))
        return ForwardBatch(
            input_ids=input_ids,
            positions=views["positions"],
            attention=self._attention(views, shape),
            lora=None if shape.lora is None else self._segments(views, shape, shape.lora),
            logit_rows=views.get("logit_rows"),
        )

    def sampling(self, chunks: Sequence[ScheduledChunk]) -> SamplingBatch | None:
        """Settings of the chunks that sample; None where all are greedy."""
        params = [chunk.request.params for chunk in chunks]
        if all(p.greedy for p in params):
            return None
        return SamplingBatch(
            temperature=self._float32([p.temperature for p in params]),
            top_p=self._float32([p.top_p for p in params]),
            min_p=self._float32([p.min_p for p in params]),
            top_k=self._int64([p.top_k for p in params]),
            seed=self._int64([p.seed for p in params]),
            token_index=self._int64([chunk.token_index for chunk in chunks]),
            filtered_rows=self._int64([row for row, p in enumerate(params) if p.filtered]),
        )

    def _add_rows(
        self, fields: IntFields, chunks: Sequence[ScheduledChunk], shape: BatchShape
    ) -> None:
        num_rows = shape.padded(shape.num_rows)
        input_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for chunk in chunks:
            if chunk.input_pending:
                input_ids.append(-1)
            else:
                input_ids += chunk.request.token_ids(chunk.start, chunk.end)
            positions += range(chunk.start, chunk.end)
            slots += self._cache_slots(chunk)
        fields.add("input_ids", input_ids, num_rows)
        fields.add("positions", positions, num_rows)
        fields.add("slot_mapping", slots, num_rows, fill=-1)
        entries, page_ids = self._rows.new_pages(chunks)
        fields.add("table_entries", entries, num_rows, fill=self._rows.padding_entry)
        fields.add("table_pages", page_ids, num_rows)

    def _cache_slots(self, chunk: ScheduledChunk) -> list[int]:
        """page_id * page_tokens + offset of each token of the chunk."""
        page_ids, page_tokens = chunk.request.page_ids, self._page_tokens
        slots: list[int] = []
        position = chunk.start
        while position < chunk.end:
            page, offset = divmod(position, page_tokens)
            count = min(page_tokens - offset, chunk.end - position)
            first = page_ids[page] * page_tokens + offset
            slots += range(first, first + count)
            position += count
        return slots

    def _add_attention(
        self,
        fields: IntFields,
        chunks: Sequence[ScheduledChunk],
        shape: BatchShape,
    ) -> None:
        decodes = [chunk for chunk in chunks if chunk.is_decode]
        prefills = chunks[len(decodes) :]
        decode_lens = [chunk.end for chunk in decodes]
        num_decodes = shape.padded(shape.num_decodes)
        fields.add("decode_rows", [chunk.request.row for chunk in decodes], num_decodes)
        fields.add("decode_context_lens", decode_lens, num_decodes)
        if self._planner is not None and shape.num_decodes:
            plan = self._planner.decode(decode_lens + [0] * (shape.num_decodes - len(decodes)))
            fields.add("item_rows", plan.item_rows.tolist())
            fields.add("item_starts", plan.item_starts.tolist())
            fields.add("row_items", plan.row_items.tolist())
            fields.add("chunk_tokens", plan.chunk_tokens.tolist())

        num_prefills = shape.padded(shape.num_prefills)
        chunk_lens = [chunk.end - chunk.start for chunk in prefills]
        context_lens = [chunk.end for chunk in prefills]
        query_indptr = [*itertools.accumulate(chunk_lens, initial=len(decodes))]
        fields.add("prefill_rows", [chunk.request.row for chunk in prefills], num_prefills)
        size = shape.padded(shape.num_prefills + 1)
        fields.add("query_indptr", query_indptr, size, query_indptr[-1])
        fields.add("prefill_context_lens", context_lens, num_prefills)
        if self._planner is not None and shape.num_prefills:
            block_rows = shape.prefill_block_rows
            tiles = self._planner.prefill(chunk_lens, context_lens, block_rows)
            size = shape.padded(
                self._planner.max_prefill_tiles(shape.num_rows, shape.num_prefills, block_rows)
            )
            fields.add("query_tile_requests", tiles.tile_requests.tolist(), size, -1)
            fields.add("query_tile_starts", tiles.tile_starts.tolist(), size)

    def _attention(self, views: Mapping[str, torch.Tensor], shape: BatchShape) -> AttentionBatch:
        return AttentionBatch(
            slot_mapping=views["slot_mapping"],
            num_decodes=shape.num_decodes,
            decode_block_tables=self._rows.block_tables(views["decode_rows"]),
            decode_context_lens=views["decode_context_lens"],
            query_indptr=views["query_indptr"],
            prefill_block_tables=self._rows.block_tables(views["prefill_rows"]),
            prefill_context_lens=views["prefill_context_lens"],
            decode_plan=_decode_plan(views),
            prefill_plan=_prefill_plan(views, shape.prefill_block_rows),
        )

    def _add_lora(
        self,
        fields: IntFields,
        chunks: Sequence[ScheduledChunk],
        shape: BatchShape,
    ) -> None:
        """Runs of rows of one adapter, and their tiles."""
        num_rows = shape.padded(shape.num_rows)
        indptr, slots = slot_runs(chunks)
        fields.add("seg_indptr", indptr, shape.padded(shape.num_rows + 1), indptr[-1])
        fields.add("seg_slots", slots, num_rows, fill=-1)
        if self._planner is None:
            return
        tiles = plan_tiles(indptr, slots, shape.lora_block_rows)
        for index, name in enumerate(TILE_FIELDS):
            column = [tile[index] for tile in tiles]
            fields.add("tile_" + name, column, num_rows, fill=UNUSED_TILE[index])

    def _add_samples(
        self, fields: IntFields, chunks: Sequence[ScheduledChunk], shape: BatchShape
    ) -> None:
        """Rows of the batch whose logits are wanted, and the row of each of their requests."""
        size = shape.padded(shape.num_samples)
        sampling = [chunk.request.row for chunk in chunks if chunk.samples]
        fields.add("sample_rows", sampling, size)
        if shape.is_padded:
            every_row = not shape.num_prefills
        else:
            every_row = all(is_plain_decode(chunk) for chunk in chunks)
        if not every_row:
            fields.add("logit_rows", logit_rows(chunks), size)

    def _segments(
        self, views: Mapping[str, torch.Tensor], shape: BatchShape, lora: LoraShape
    ) -> LoraSegments:
        tables = self._tables
        tiles = None
        if self._planner is not None:
            slots, row_starts, row_ends, shares, num_shares = (
                views["tile_" + name] for name in TILE_FIELDS
            )
            tiles = LoraTiles(
                slots, row_starts, row_ends, shares, num_shares, shape.lora_block_rows
            )
        return LoraSegments(
            seg_indptr=views["seg_indptr"],
            seg_slots=views["seg_slots"],
            page_tables=tables.page_tables,
            offsets=tables.offsets,
            scaling=tables.scaling,
            max_rank=lora.max_rank,
            modules=lora.modules,
            tiles=tiles,
        )

    def _int64(self, values: list[int]) -> torch.Tensor:
        return self._on_device(torch.tensor(values, dtype=torch.int64))

    def _float32(self, values: list[float]) -> torch.Tensor:
        return self._on_device(torch.tensor(values, dtype=torch.float32))

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        device = self._tables.page_tables.device
        if device.type == "cuda":
            return values.pin_memory().to(device, non_blocking=True)
        return values


def _decode_plan(views: Mapping[str, torch.Tensor]) -> DecodePlan | None:
    if "item_rows" not in views:
        return None
    return DecodePlan(
        views["item_rows"], views["item_starts"], views["row_items"], views["chunk_tokens"]
    )


def _prefill_plan(views: Mapping[str, torch.Tensor], block_rows: int) -> PrefillPlan | None:
    if "query_tile_requests" not in views:
        return None
    return PrefillPlan(views["query_tile_requests"], views["query_tile_starts"], block_rows)
