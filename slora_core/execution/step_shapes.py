"""Which shape a step has: how many rows of which kind, for which LoRA, padded to a graph or not.

Few shapes in all, since kernels are compiled and graphs captured for each. It reads a plan's chunks
and what the adapters of its slots need; the numbers of a step are `StepBuilder`'s.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from kernels.lora_segments import choose_block_rows
from slora_core.adapters.page_layout import AdapterLayout
from slora_core.attention.planner import AttentionPlanner
from slora_core.config import MAX_RANK, EngineConfig
from slora_core.execution.buckets import (
    MAX_GRAPH_PROMPTS,
    RANK_BUCKETS,
    LoraShape,
    batch_buckets,
    bucket_of,
    max_graph_rows,
    module_buckets,
    prompt_batch_buckets,
)
from slora_core.execution.chunks import is_plain_decode, slot_runs
from slora_core.execution.step_inputs import StepShape
from slora_core.models.config import ModelConfig
from slora_core.requests import ScheduledChunk


class StepShapes:
    """`planner` as of `StepBuilder`."""

    def __init__(
        self, model: ModelConfig, engine: EngineConfig, planner: AttentionPlanner | None
    ) -> None:
        self._max_requests = engine.max_running_requests
        self._graph_max_rank = engine.graph_max_rank
        self._planner = planner
        self._module_buckets = module_buckets(model)
        # Of each adapter slot, what its adapter needs of the LoRA kernels; nothing where none is.
        self._slots: defaultdict[int, LoraShape] = defaultdict(lambda: LoraShape(0, frozenset()))
        # Whether steps that fit into a graph are padded to it.
        self.has_graphs = engine.device == "cuda" and engine.cuda_graphs
        # Rows that graphs have, by whether they have room for prompts.
        self._graph_sizes = {
            False: batch_buckets(engine.max_running_requests),
            True: prompt_batch_buckets(max_graph_rows(engine)),
        }

    def adapter_loaded(self, slot: int, layout: AdapterLayout) -> None:
        """An adapter of this layout is in the slot, for steps planned from here on."""
        self._slots[slot] = LoraShape(layout.max_rank, layout.modules)

    def of(self, chunks: Sequence[ScheduledChunk]) -> StepShape:
        """The shape of a plan's chunks."""
        num_decodes = sum(chunk.is_decode for chunk in chunks)
        lora = self._lora_shape(chunks)
        if num_decodes == len(chunks):
            return StepShape(num_decodes, num_decodes, 0, lora)
        chunk_lens = [chunk.end - chunk.start for chunk in chunks]
        bounds, slots = slot_runs(chunks)
        prefill_block_rows = 0
        if self._planner is not None:
            prefill_block_rows = self._planner.prefill_block_rows(chunk_lens[num_decodes:])
        return StepShape(
            bounds[-1],
            num_decodes,
            len(chunks) - num_decodes,
            lora,
            choose_block_rows(bounds[-1], len(slots)),
            prefill_block_rows,
        )

    def graph_of(self, chunks: Sequence[ScheduledChunk]) -> StepShape | None:
        """That of the smallest graph which holds the chunks; None where there is none."""
        if not self.has_graphs:
            return None
        has_prompts = not all(is_plain_decode(chunk) for chunk in chunks)
        num_rows = sum(chunk.end - chunk.start for chunk in chunks)
        sizes = self._graph_sizes[has_prompts]
        if num_rows > sizes[-1]:
            return None
        if has_prompts and sum(not chunk.is_decode for chunk in chunks) > MAX_GRAPH_PROMPTS:
            return None
        lora = self._lora_shape(chunks)
        lora = None if lora is None else lora.graph_bucket(self._module_buckets)
        return self._padded_shape(bucket_of(num_rows, sizes), has_prompts, lora)

    def graphs(self) -> Iterator[StepShape]:
        """Of every graph that is captured at the start, large ones first.

        The others find room in the memory that these took.
        """
        for has_prompts in (True, False):
            for num_rows in reversed(self._graph_sizes[has_prompts]):
                for lora in (None, *self.lora_shapes(self._graph_max_rank)):
                    yield self._padded_shape(num_rows, has_prompts, lora)

    def lora_shapes(self, max_rank: int = MAX_RANK) -> list[LoraShape]:
        """What LoRA kernels are launched for, up to a rank."""
        return [
            LoraShape(rank, modules)
            for rank in RANK_BUCKETS
            if rank <= max_rank
            for modules in self._module_buckets
        ]

    def _lora_shape(self, chunks: Sequence[ScheduledChunk]) -> LoraShape | None:
        """What the chunks' adapters need; None where all use the base model."""
        slots = {chunk.slot for chunk in chunks} - {-1}
        if not slots:
            return None
        shapes = [self._slots[slot] for slot in slots]
        max_rank = max(shape.max_rank for shape in shapes)
        if self._planner is not None:
            # Few values, for each of which kernels are compiled.
            max_rank = bucket_of(max_rank, RANK_BUCKETS)
        return LoraShape(max_rank, frozenset().union(*(shape.modules for shape in shapes)))

    def _padded_shape(self, num_rows: int, has_prompts: bool, lora: LoraShape | None) -> StepShape:
        """What a graph of so many rows is captured for: of decodes, or with room for prompts."""
        if not has_prompts:
            return StepShape(num_rows, num_rows, 0, lora, is_padded=True)
        prefill_block_rows = 0
        if self._planner is not None:
            prefill_block_rows = self._planner.prefill_block_rows([num_rows])
        return StepShape(
            num_rows,
            min(num_rows, self._max_requests),
            min(num_rows, MAX_GRAPH_PROMPTS),
            lora,
            prefill_block_rows=prefill_block_rows,
            is_padded=True,
        )
