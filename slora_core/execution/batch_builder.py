"""Turns a `StepPlan` into the tensors of a `ForwardBatch`.

Rows keep the plan's order: decodes first, each part ordered by adapter, so that an adapter is one
segment of decode rows and one of prefill rows. Decides nothing.
"""

import torch

from kernels.lora_segments import LoraSegments
from slora_core.adapters.device_tables import DeviceAdapterTables
from slora_core.memory.sizing import pages_for
from slora_core.types import (
    AttentionBatch,
    ForwardBatch,
    SamplingBatch,
    ScheduledChunk,
    StepPlan,
)


class BatchBuilder:
    def __init__(self, page_tokens: int, tables: DeviceAdapterTables, device: torch.device) -> None:
        self._page_tokens = page_tokens
        self._tables = tables
        self._device = device
        # Last sampled token of each row, by the runner: what a pending input is.
        self.row_tokens: dict[int, int] = {}

    def build(self, plan: StepPlan) -> ForwardBatch:
        """Tensors of one step; the plan has at least one chunk and is sorted."""
        input_ids: list[int] = []
        positions: list[int] = []
        logit_rows: list[int] = []
        for chunk in plan.chunks:
            if chunk.input_pending:
                input_ids.append(self.row_tokens[chunk.request.row])
            else:
                input_ids += chunk.request.token_ids(chunk.start, chunk.end)
            positions += range(chunk.start, chunk.end)
            if chunk.samples:
                logit_rows.append(len(input_ids) - 1)
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        return ForwardBatch(
            input_ids=self._int64(input_ids),
            positions=self._int64(positions),
            attention=self._attention(plan.chunks),
            lora=self._segments(plan.chunks),
            logit_rows=self._int64(logit_rows),
            sampling=self._sampling(sampling),
        )

    def _attention(self, chunks: list[ScheduledChunk]) -> AttentionBatch:
        decodes = [chunk for chunk in chunks if chunk.is_decode]
        prefills = chunks[len(decodes) :]
        query_indptr = [0]
        for chunk in prefills:
            query_indptr.append(query_indptr[-1] + chunk.end - chunk.start)
        return AttentionBatch(
            slot_mapping=self._int64([slot for chunk in chunks for slot in self._slots(chunk)]),
            num_decodes=len(decodes),
            decode_block_tables=self._block_tables(decodes),
            decode_context_lens=self._int32([chunk.end for chunk in decodes]),
            query_indptr=self._int32(query_indptr),
            prefill_block_tables=self._block_tables(prefills),
            prefill_context_lens=self._int32([chunk.end for chunk in prefills]),
        )

    def _slots(self, chunk: ScheduledChunk) -> list[int]:
        """page_id * page_tokens + offset of each token of the chunk."""
        page_ids, page_tokens = chunk.request.page_ids, self._page_tokens
        return [
            page_ids[position // page_tokens] * page_tokens + position % page_tokens
            for position in range(chunk.start, chunk.end)
        ]

    def _block_tables(self, chunks: list[ScheduledChunk]) -> torch.Tensor:
        """int32 [len(chunks), widest]: pages of each context, padded with page 0."""
        tables = [
            chunk.request.page_ids[: pages_for(chunk.end, self._page_tokens)] for chunk in chunks
        ]
        width = max((len(table) for table in tables), default=0)
        padded = [table + [0] * (width - len(table)) for table in tables]
        return self._int32(padded).view(len(chunks), width)

    def _segments(self, chunks: list[ScheduledChunk]) -> LoraSegments | None:
        """Runs of rows of one adapter; None where all rows are the base model's."""
        indptr, slots = [0], [chunks[0].slot]
        row = 0
        for chunk in chunks:
            if chunk.slot != slots[-1]:
                indptr.append(row)
                slots.append(chunk.slot)
            row += chunk.end - chunk.start
        indptr.append(row)
        used = [slot for slot in slots if slot >= 0]
        if not used:
            return None
        return LoraSegments(
            seg_indptr=self._int32(indptr),
            seg_slots=self._int32(slots),
            page_tables=self._tables.page_tables,
            offsets=self._tables.offsets,
            scaling=self._tables.scaling,
            max_rank=max(self._tables.max_ranks[slot] for slot in used),
        )

    def _sampling(self, chunks: list[ScheduledChunk]) -> SamplingBatch:
        params = [chunk.request.params for chunk in chunks]
        return SamplingBatch(
            temperature=self._float32([p.temperature for p in params]),
            top_p=self._float32([p.top_p for p in params]),
            min_p=self._float32([p.min_p for p in params]),
            top_k=self._int64([p.top_k for p in params]),
            seed=self._int64([p.seed for p in params]),
            token_index=self._int64([chunk.token_index for chunk in chunks]),
            filtered_rows=self._int64([row for row, p in enumerate(params) if p.filtered]),
            all_greedy=all(p.greedy for p in params),
        )

    def _int32(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)

    def _int64(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _float32(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)
