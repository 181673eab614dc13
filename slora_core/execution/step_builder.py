"""The host's side of a step: a plan's chunks become `StepInputs`, numbers that any rank can run.

Rows keep the plan's order: decodes first, each part ordered by adapter, so that an adapter is one
segment of decode rows and one of prefill rows. It touches no device and decides nothing.
"""

import itertools
from collections.abc import Sequence

from kernels.lora_segments import TILE_FIELDS, UNUSED_TILE, plan_tiles
from slora_core.attention.planner import AttentionPlanner
from slora_core.config import EngineConfig
from slora_core.execution.chunks import is_plain_decode, logit_rows, slot_runs
from slora_core.execution.int_fields import IntFields
from slora_core.execution.sent_pages import SentPages
from slora_core.execution.step_inputs import (
    MaskedTokens,
    SamplingInputs,
    StepInputs,
    StepShape,
)
from slora_core.execution.step_shapes import StepShapes
from slora_core.memory.page_pool import pages_for
from slora_core.models.config import ModelConfig
from slora_core.requests import ScheduledChunk


class StepBuilder:
    """Args:
    planner: makes the plans that Triton's kernels run by; None where the torch twins run.
    """

    def __init__(
        self, model: ModelConfig, engine: EngineConfig, planner: AttentionPlanner | None
    ) -> None:
        self.shapes = StepShapes(model, engine, planner)
        self._page_tokens = engine.page_tokens
        self._eos_token_ids = frozenset(model.eos_token_ids)
        self._planner = planner
        self._sent = SentPages(
            engine.max_running_requests, pages_for(engine.context_len(model), engine.page_tokens)
        )

    def build(self, chunks: Sequence[ScheduledChunk]) -> StepInputs:
        """A plan's step; steps are run in the order in which they are built."""
        return self.build_as(chunks, self.shapes.graph_of(chunks) or self.shapes.of(chunks))

    def build_as(self, chunks: Sequence[ScheduledChunk], shape: StepShape) -> StepInputs:
        """A step of this shape.

        Args:
            chunks: of a plan, sorted; none make a step of padding alone.
            shape: the chunks' own, or a padded one with room for them. Padding rows write nothing
                that is read, and what is sampled for them is garbage.
        """
        sampling = [chunk for chunk in chunks if chunk.samples]
        # A decode brings one new page at most, for which a graph has room; a prompt whose beginning
        # is cached may bring more pages than it has rows.
        pages = None
        if shape.is_padded and shape.num_prefills:
            pages = self._pages_beyond(chunks, shape.num_rows)
        fields = IntFields()
        self._add_rows(fields, chunks, shape)
        self._add_attention(fields, chunks, shape)
        if shape.lora is not None:
            self._add_lora(fields, chunks, shape)
        self._add_samples(fields, chunks, shape)
        return StepInputs(
            shape, fields, len(sampling), _sampling(sampling), self._masked(sampling), pages
        )

    def _pages_beyond(self, chunks: Sequence[ScheduledChunk], room: int) -> IntFields | None:
        """A step's new page ids where they are more than `room`; the step then brings none."""
        if self._sent.num_new_pages(chunks) <= room:
            return None
        entries, page_ids = self._sent.new_pages(chunks)
        fields = IntFields()
        fields.add("table_entries", entries)
        fields.add("table_pages", page_ids)
        return fields

    def _add_rows(
        self, fields: IntFields, chunks: Sequence[ScheduledChunk], shape: StepShape
    ) -> None:
        num_rows = shape.padded(shape.num_rows)
        input_ids: list[int] = []
        positions: list[int] = []
        kv_places: list[int] = []
        for chunk in chunks:
            if chunk.input_pending:
                input_ids.append(-1)
            else:
                input_ids += chunk.request.token_ids(chunk.start, chunk.end)
            positions += range(chunk.start, chunk.end)
            kv_places += self._kv_places(chunk)
        fields.add("input_ids", input_ids, num_rows)
        fields.add("positions", positions, num_rows)
        fields.add("kv_places", kv_places, num_rows, fill=-1)
        entries, page_ids = self._sent.new_pages(chunks)
        fields.add("table_entries", entries, num_rows, fill=self._sent.padding_entry)
        fields.add("table_pages", page_ids, num_rows)

    def _kv_places(self, chunk: ScheduledChunk) -> list[int]:
        """page_id * page_tokens + offset of each token of the chunk."""
        page_ids, page_tokens = chunk.request.page_ids, self._page_tokens
        places: list[int] = []
        position = chunk.start
        while position < chunk.end:
            page, offset = divmod(position, page_tokens)
            count = min(page_tokens - offset, chunk.end - position)
            first = page_ids[page] * page_tokens + offset
            places += range(first, first + count)
            position += count
        return places

    def _add_attention(
        self, fields: IntFields, chunks: Sequence[ScheduledChunk], shape: StepShape
    ) -> None:
        decodes = [chunk for chunk in chunks if chunk.is_decode]
        prefills = chunks[len(decodes) :]
        decode_lens = [chunk.end for chunk in decodes]
        num_decodes = shape.padded(shape.num_decodes)
        fields.add("decode_table_idxs", [chunk.request.table_idx for chunk in decodes], num_decodes)
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
        table_idxs = [chunk.request.table_idx for chunk in prefills]
        fields.add("prefill_table_idxs", table_idxs, num_prefills)
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

    def _add_lora(
        self, fields: IntFields, chunks: Sequence[ScheduledChunk], shape: StepShape
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
        self, fields: IntFields, chunks: Sequence[ScheduledChunk], shape: StepShape
    ) -> None:
        """Rows of the batch whose logits are wanted, and the place of each of their requests."""
        size = shape.padded(shape.num_samples)
        table_idxs = [chunk.request.table_idx for chunk in chunks if chunk.samples]
        fields.add("sample_table_idxs", table_idxs, size)
        if shape.is_padded:
            every_row = not shape.num_prefills
        else:
            every_row = all(is_plain_decode(chunk) for chunk in chunks)
        if not every_row:
            fields.add("logit_rows", logit_rows(chunks), size)

    def _masked(self, chunks: Sequence[ScheduledChunk]) -> MaskedTokens | None:
        """What would end requests that have not got their min_tokens, of the chunks that sample."""
        rows: list[int] = []
        token_ids: list[int] = []
        for row, chunk in enumerate(chunks):
            sampling = chunk.request.sampling
            if sampling.min_tokens and chunk.token_index < sampling.min_tokens:
                ends = set(sampling.stop_token_ids)
                if not sampling.ignore_eos:
                    ends |= self._eos_token_ids
                rows += [row] * len(ends)
                token_ids += ends
        return MaskedTokens(rows, token_ids) if rows else None


def _sampling(chunks: Sequence[ScheduledChunk]) -> SamplingInputs | None:
    """Settings of the chunks that sample; None where all are greedy."""
    settings = [chunk.request.sampling for chunk in chunks]
    if all(s.greedy for s in settings):
        return None
    return SamplingInputs(
        temperature=[s.temperature for s in settings],
        top_p=[s.top_p for s in settings],
        min_p=[s.min_p for s in settings],
        top_k=[s.top_k for s in settings],
        seed=[s.seed for s in settings],
        token_index=[chunk.token_index for chunk in chunks],
        filtered_rows=[row for row, s in enumerate(settings) if s.filtered],
    )
