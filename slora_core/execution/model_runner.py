"""Owns the device side of an engine: weights, pool, adapter tables; runs one planned step.

Never decides what runs. Called by the engine with what the scheduler planned. On CUDA a launch
returns before the device has computed the step.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import ModuleType

import torch

from kernels import torch_ops
from slora_core.adapters.adapter_tables import DeviceAdapterTables
from slora_core.adapters.page_layout import AdapterGeometry, PackedAdapter, max_adapter_pages
from slora_core.attention.paged_backend import PagedAttention
from slora_core.attention.planner import AttentionPlanner
from slora_core.config import EngineConfig, ModelConfig
from slora_core.execution.buckets import (
    MAX_GRAPH_PROMPTS,
    MODULE_BUCKETS,
    RANK_BUCKETS,
    LoraShape,
    batch_buckets,
    bucket_of,
    max_graph_rows,
    prompt_batch_buckets,
    warm_up_sizes,
)
from slora_core.execution.chunks import is_plain_decode
from slora_core.execution.dummy_steps import prompt_step
from slora_core.execution.graphs import GraphKey, StepGraphs
from slora_core.execution.int_fields import IntFields
from slora_core.execution.row_state import RowState
from slora_core.execution.sampler import sample
from slora_core.execution.step_builder import BatchBuilder, BatchShape
from slora_core.execution.step_handle import StepHandle
from slora_core.memory.page_pool import pages_for
from slora_core.memory.sizing import allocate_pool
from slora_core.models.decoder import Decoder
from slora_core.models.weights import DecoderWeights
from slora_core.requests import ScheduledChunk, StepPlan

logger = logging.getLogger(__name__)


class ModelRunner:
    """Args:
    ops: the kernel module; None takes the device's: `triton_ops` on CUDA, else `torch_ops`.
    """

    def __init__(
        self,
        model: ModelConfig,
        engine: EngineConfig,
        weights: DecoderWeights,
        max_slots: int,
        ops: ModuleType | None = None,
    ) -> None:
        self._model = model
        self._engine = engine
        self._device = torch.device(engine.device)
        ops = ops or _ops_of(self._device)
        self.pool = allocate_pool(model, engine)
        max_pages = min(max_adapter_pages(AdapterGeometry.of(model, engine)), engine.num_pages)
        self.tables = DeviceAdapterTables(self.pool, max_slots, max_pages)
        context_len = engine.context_len(model)
        self._rows = RowState(
            engine.max_running_requests, pages_for(context_len, engine.page_tokens), self._device
        )
        planner = None if ops is torch_ops else AttentionPlanner(model, self.pool.dtype)
        self._prefill_tiles = () if planner is None else planner.prefill_tiles
        self._builder = BatchBuilder(engine.page_tokens, self.tables, self._rows, planner)
        self._attention = PagedAttention(ops, model, self.pool, engine.page_tokens, context_len)
        self._decoder = Decoder(model, weights, ops, self.pool)
        # Rows that graphs have, by whether they have room for prompts.
        self._graph_sizes = {
            False: batch_buckets(engine.max_running_requests),
            True: prompt_batch_buckets(max_graph_rows(engine)),
        }
        self._graphs: StepGraphs | None = None
        # fp32 [rows, vocab_size]: what graphs write, outside the memory that they share.
        self._graph_logits: torch.Tensor | None = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and load all kernels, so that no request waits for them.

        For the base model and each shape of LoRA up to `graph_max_rank`, by the first layer. Steps
        write to pages that nobody has yet.
        """
        # Triton is loaded only where it is used.
        from kernels.compile_together import compile_together

        with compile_together():
            self._run_every_kernel()
        self._run_every_kernel()

    def _run_every_kernel(self) -> None:
        sizes = warm_up_sizes(self._engine.max_batched_tokens)
        for num_tokens in sizes:
            for lora in (None, *self._lora_shapes()):
                # With LoRA an empty slot: its kernels find that it has no weights.
                slot = -1 if lora is None else 0
                plan = prompt_step(self._model, self._engine, num_tokens, slot)
                self._run_first_layer(plan, replace(self._builder.shape(plan.chunks), lora=lora))
        for block_rows in self._prefill_tiles:
            plan = prompt_step(self._model, self._engine, sizes[0])
            shape = replace(self._builder.shape(plan.chunks), prefill_block_rows=block_rows)
            self._run_first_layer(plan, shape)
        for key in self._graph_keys():
            self._run_first_layer(StepPlan(), self._graph_shape(key))

    def _run_first_layer(self, plan: StepPlan, shape: BatchShape) -> None:
        views = self._builder.fields(plan.chunks, shape).to(self._device)
        self._forward(views, shape, num_layers=1)

    def _lora_shapes(self) -> list[LoraShape]:
        return [
            LoraShape(rank, modules)
            for rank in RANK_BUCKETS
            if rank <= self._engine.graph_max_rank
            for modules in MODULE_BUCKETS
        ]

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """Record small steps of every size, for the base model and each shape of LoRA."""
        self._graph_logits = torch.empty(
            self._engine.max_running_requests, self._model.vocab_size, device=self._device
        )
        self._graphs = StepGraphs(self._device)
        for key in self._graph_keys():
            self._capture(key)
        logger.info("captured %d graphs of steps", len(self._graphs))

    def _graph_keys(self) -> Iterator[GraphKey]:
        # Large ones first: the others find room in the memory that these took.
        for has_prompts in (True, False):
            for num_rows in reversed(self._graph_sizes[has_prompts]):
                for lora in (None, *self._lora_shapes()):
                    yield GraphKey(num_rows, has_prompts, lora)

    def load_adapters(self, plan: StepPlan, host_copy: Callable[[str], PackedAdapter]) -> None:
        """Make the copies a plan asks for; `host_copy` gives the pages of an adapter id."""
        for load in plan.adapter_loads:
            self.tables.load(load.slot, host_copy(load.adapter_id), load.page_ids)

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """fp32 [chunks that sample, vocab_size]; also writes the KV of every row."""
        return self._run(plan)[0]

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> StepHandle:
        """Start a step; its loads were made by `load_adapters`."""
        logits, rows = self._replay(plan) or self._run(plan)
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        if not sampling:
            # On the device: the step is waited for like any other.
            return StepHandle(torch.empty(0, dtype=torch.int32, device=self._device))
        tokens = sample(logits, self._builder.sampling(sampling)).int()
        self._rows.write_last_tokens(rows, tokens)
        return StepHandle(tokens)

    def _run(self, plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits as `logits`, and the row of each of their requests, int32 on the device."""
        shape = self._builder.shape(plan.chunks)
        views = self._builder.fields(plan.chunks, shape).to(self._device)
        return self._forward(views, shape).float(), views["sample_rows"]

    def _replay(self, plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What `_run` returns, by a CUDA graph; None where the plan has no graph."""
        if self._graphs is None:
            return None
        key = self._graph_key(plan.chunks)
        if key is None:
            return None
        if key not in self._graphs:
            logger.warning("capturing a graph that was not captured at start: %s", key)
            self._capture(key)
        # A decode brings one new page at most, for which a graph has room; a prompt whose beginning
        # is cached may bring more pages than it has rows.
        if key.has_prompts and self._rows.num_new_pages(plan.chunks) > key.num_rows:
            self._send_pages(plan.chunks)
        fields = self._builder.fields(plan.chunks, self._graph_shape(key))
        inputs = self._graphs.replay(key, fields)
        rows = fields.views(inputs)["sample_rows"]
        num_samples = sum(chunk.samples for chunk in plan.chunks)
        assert self._graph_logits is not None
        return self._graph_logits[:num_samples], rows[:num_samples]

    def _graph_key(self, chunks: Sequence[ScheduledChunk]) -> GraphKey | None:
        """The smallest graph that holds the chunks; None where there is none."""
        has_prompts = not all(is_plain_decode(chunk) for chunk in chunks)
        num_rows = sum(chunk.end - chunk.start for chunk in chunks)
        sizes = self._graph_sizes[has_prompts]
        if num_rows > sizes[-1]:
            return None
        if has_prompts and sum(not chunk.is_decode for chunk in chunks) > MAX_GRAPH_PROMPTS:
            return None
        lora = self._builder.lora_shape(chunks)
        return GraphKey(bucket_of(num_rows, sizes), has_prompts, lora and lora.graph_bucket())

    def _send_pages(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Write a step's new page ids before it, for a graph that has no room for them."""
        entries, page_ids = self._rows.new_pages(chunks)
        fields = IntFields()
        fields.add("entries", entries)
        fields.add("page_ids", page_ids)
        views = fields.to(self._device)
        self._rows.write_pages(views["entries"], views["page_ids"])

    def _graph_shape(self, key: GraphKey) -> BatchShape:
        max_prompts = MAX_GRAPH_PROMPTS if key.has_prompts else 0
        return self._builder.padded_shape(key.num_rows, max_prompts, key.lora)

    def _capture(self, key: GraphKey) -> None:
        assert self._graphs is not None and self._graph_logits is not None
        shape = self._graph_shape(key)
        fields = self._builder.fields([], shape)
        logits = self._graph_logits[: shape.num_samples]

        def forward(inputs: torch.Tensor, num_layers: int | None) -> None:
            logits.copy_(self._forward(fields.views(inputs), shape, num_layers))

        self._graphs.capture(key, fields, forward)

    def _forward(
        self,
        views: Mapping[str, torch.Tensor],
        shape: BatchShape,
        num_layers: int | None = None,
    ) -> torch.Tensor:
        """Logits [rows that sample, vocab_size] of the model's dtype; layers as of `Decoder`."""
        batch = self._builder.forward_batch(views, shape)
        return self._decoder.forward(batch, self._attention, num_layers)


def _ops_of(device: torch.device) -> ModuleType:
    if device.type != "cuda":
        return torch_ops
    # Triton is loaded only where it is used.
    from kernels import triton_ops

    return triton_ops
