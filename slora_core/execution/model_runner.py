"""The device's side of an engine: weights, pool, adapter tables; runs one step's inputs.

Knows no requests and decides nothing: `StepBuilder` made the inputs, on this or another process. On
CUDA a run returns before the device has computed the step.
"""

from collections.abc import Mapping
from types import ModuleType

import torch

from kernels import torch_ops
from slora_core.adapters.adapter_tables import AdapterTables
from slora_core.adapters.page_layout import AdapterGeometry, PackedAdapter, max_adapter_pages
from slora_core.attention.paged_backend import PagedAttention
from slora_core.attention.planner import AttentionPlanner
from slora_core.config import EngineConfig
from slora_core.execution.batch_views import forward_batch
from slora_core.execution.graphs import StepGraphs
from slora_core.execution.late_graphs import LateGraphs
from slora_core.execution.request_tables import RequestTables
from slora_core.execution.sampler import SamplingBatch, mask_tokens, sample
from slora_core.execution.step_handle import StepHandle
from slora_core.execution.step_inputs import StepInputs, StepShape
from slora_core.memory.page_pool import pages_for
from slora_core.memory.sizing import allocate_pool
from slora_core.models.config import ModelConfig
from slora_core.models.decoder import Decoder
from slora_core.models.weights import DecoderWeights
from slora_core.requests import AdapterLoad


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
        self._device = torch.device(engine.device)
        ops = ops or _ops_of(self._device)
        self.pool = allocate_pool(model, engine)
        # How Triton's kernels divide attention, for who makes the inputs; None for the torch twins.
        self.attention_planner = None
        if ops is not torch_ops:
            self.attention_planner = AttentionPlanner(model, self.pool.dtype)
        max_pages = min(max_adapter_pages(AdapterGeometry.of(model, engine)), engine.num_pages)
        num_modules = len(model.names.projections)
        self.tables = AdapterTables(self.pool, num_modules, max_slots, max_pages)
        context_len = engine.context_len(model)
        self._request_tables = RequestTables(
            engine.max_running_requests, pages_for(context_len, engine.page_tokens), self._device
        )
        self._attention = PagedAttention(ops, model, self.pool, engine.page_tokens, context_len)
        self._decoder = Decoder(model, weights, ops, self.pool)
        self._graphs: StepGraphs | None = None
        if self._device.type == "cuda" and engine.cuda_graphs:
            self._graphs = StepGraphs(self._device)
        self.late_graphs = LateGraphs()
        # fp32 [requests, vocab_size]: what graphs write, outside the memory that they share.
        self._graph_logits = torch.empty(
            engine.max_running_requests if self._graphs is not None else 0,
            model.vocab_size,
            device=self._device,
        )

    def load_adapter(self, load: AdapterLoad, adapter: PackedAdapter) -> None:
        """Make a copy that a plan asks for, before its step is run."""
        self.tables.load(load.slot, adapter, load.page_ids)

    @torch.inference_mode()
    def run(self, inputs: StepInputs) -> StepHandle:
        """Start a step; the adapters that it uses were loaded by `load_adapter`."""
        logits, table_idxs = self._logits(inputs)
        if not inputs.num_samples:
            # On the device: the step is waited for like any other.
            return StepHandle(torch.empty(0, dtype=torch.int32, device=self._device))
        if inputs.masked is not None:
            # In place: whoever wrote these logits writes them anew before they are read again.
            mask_tokens(logits, inputs.masked)
        sampling = None
        if inputs.sampling is not None:
            sampling = SamplingBatch.of(inputs.sampling, self._device)
        tokens = sample(logits, sampling).int()
        self._request_tables.write_last_tokens(table_idxs, tokens)
        return StepHandle(tokens)

    @torch.inference_mode()
    def logits(self, inputs: StepInputs) -> torch.Tensor:
        """fp32 [rows that sample, vocab_size]; also writes the KV of every row."""
        return self._logits(inputs)[0]

    @torch.inference_mode()
    def capture(self, inputs: StepInputs) -> None:
        """Record the graph of a padded step's shape."""
        shape, fields = inputs.shape, inputs.fields
        assert self._graphs is not None and shape.is_padded
        logits = self._graph_logits[: shape.num_samples]

        def forward(buffer: torch.Tensor, num_layers: int | None) -> None:
            logits.copy_(self._forward(fields.views(buffer), shape, num_layers))

        self._graphs.capture(shape, fields, forward)

    @torch.inference_mode()
    def launch_kernels(self, inputs: StepInputs) -> None:
        """Launch every kernel that the step launches, each once."""
        self._forward(inputs.fields.to(self._device), inputs.shape, num_layers=1)

    def synchronize(self) -> None:
        """Wait for all steps and copies that were started.

        Raises:
            torch.AcceleratorError: the device has failed, and does for whatever comes.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def num_graphs(self) -> int:
        return 0 if self._graphs is None else len(self._graphs)

    def _logits(self, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits as `logits`, and the table index of each of their requests, int32."""
        if inputs.pages is not None:
            pages = inputs.pages.to(self._device)
            self._request_tables.write_pages(pages["table_entries"], pages["table_pages"])
        if inputs.shape.is_padded and self._graphs is not None:
            if inputs.shape in self._graphs:
                return self._replay(inputs, self._graphs)
            self.late_graphs.want(inputs.shape)
        views = inputs.fields.to(self._device)
        num_samples = inputs.num_samples
        logits = self._forward(views, inputs.shape)[:num_samples].float()
        return logits, views["sample_table_idxs"][:num_samples]

    def _replay(self, inputs: StepInputs, graphs: StepGraphs) -> tuple[torch.Tensor, torch.Tensor]:
        """What `_logits` returns, by a CUDA graph."""
        buffer = graphs.replay(inputs.shape, inputs.fields)
        table_idxs = inputs.fields.views(buffer)["sample_table_idxs"]
        num_samples = inputs.num_samples
        return self._graph_logits[:num_samples], table_idxs[:num_samples]

    def _forward(
        self, views: Mapping[str, torch.Tensor], shape: StepShape, num_layers: int | None = None
    ) -> torch.Tensor:
        """Logits [rows that sample, vocab_size] of the model's dtype; layers as of `Decoder`.

        All of it may be captured in a CUDA graph.
        """
        batch = forward_batch(views, shape, self._request_tables, self.tables)
        return self._decoder.forward(batch, self._attention, num_layers)


def _ops_of(device: torch.device) -> ModuleType:
    if device.type != "cuda":
        return torch_ops
    # Triton is loaded only where it is used.
    from kernels import triton_ops

    return triton_ops
