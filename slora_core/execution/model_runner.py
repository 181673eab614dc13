"""Owns the device side of an engine: weights, pool, adapter tables; runs one planned step.

Never decides what runs. Called by the engine with what the scheduler planned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from kernels import reference
from slora_core.adapters.device_tables import DeviceAdapterTables
from slora_core.adapters.page_layout import PackedAdapter
from slora_core.attention.paged_backend import PagedAttention
from slora_core.config import EngineConfig, ModelConfig
from slora_core.execution.batch_builder import BatchBuilder
from slora_core.execution.sampler import sample
from slora_core.memory.sizing import allocate_pool
from slora_core.models.decoder import Decoder
from slora_core.models.weights import DecoderWeights
from slora_core.types import StepPlan


@dataclass(frozen=True)
class StepHandle:
    """A launched step."""

    _token_ids: list[int]

    def token_ids(self) -> list[int]:
        """The sampled token of each chunk that samples, in the plan's order; waits for them."""
        return self._token_ids


class ModelRunner:
    def __init__(
        self,
        model: ModelConfig,
        engine: EngineConfig,
        weights: DecoderWeights,
        max_slots: int,
        ops: ModuleType = reference,
    ) -> None:
        self.pool = allocate_pool(model, engine)
        self.tables = DeviceAdapterTables(self.pool, max_slots)
        self._builder = BatchBuilder(engine.page_tokens, self.tables, self.pool.device)
        self._attention = PagedAttention(
            ops, model, self.pool, engine.page_tokens, engine.context_len(model)
        )
        self._decoder = Decoder(model, weights, ops, self.pool)

    def load_adapters(self, plan: StepPlan, host_copy: Callable[[str], PackedAdapter]) -> None:
        """Make the copies a plan asks for; `host_copy` gives the pages of an adapter id."""
        for load in plan.adapter_loads:
            self.tables.load(load.slot, host_copy(load.adapter_id), load.page_ids)

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """fp32 [chunks that sample, vocab_size]; also writes the KV of every row."""
        return self._decoder.forward(self._builder.build(plan), self._attention)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[int]:
        """Run a plan and return the sampled token of each chunk that samples, in its order."""
        batch = self._builder.build(plan)
        logits = self._decoder.forward(batch, self._attention)
        if not len(batch.logit_rows):
            return []
        return sample(logits, batch.sampling).tolist()

    def launch(self, plan: StepPlan) -> StepHandle:
        """Run a plan, whose inputs may be tokens that a plan launched before samples."""
        token_ids = self.run(plan)
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        for chunk, token_id in zip(sampling, token_ids, strict=True):
            self._builder.row_tokens[chunk.request.row] = token_id
        return StepHandle(token_ids)
