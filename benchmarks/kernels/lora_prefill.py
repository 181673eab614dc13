"""A decoder layer over prompts of one adapter, and over the same rows of the base model.

For `bench_lora_kernels`, which measures both: their difference is what LoRA adds to a prefill.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from benchmarks.engine.dummy_adapters import ADAPTER_STD, uniform_layout
from benchmarks.kernels.compare import assert_near
from kernels.lora_segments import LoraSegments, LoraTiles, choose_block_rows, plan_tiles
from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.attention.batch import AttentionBatch
from slora_core.attention.paged_backend import PagedAttention
from slora_core.attention.planner import AttentionPlanner
from slora_core.config import EngineConfig
from slora_core.dtypes import dtype_name
from slora_core.execution.buckets import RANK_BUCKETS, bucket_of
from slora_core.models.config import ModelConfig
from slora_core.models.decoder import DecoderLayer
from slora_core.models.weights import DecoderWeights, dummy_weights

# Called in turn, so that no weights are left in the L2 cache.
NUM_LAYERS = 2


@dataclass(frozen=True)
class PrefillInputs:
    """Prompts of one length that start empty, each on pages of its own."""

    model: ModelConfig
    weights: DecoderWeights
    pool: torch.Tensor
    page_tokens: int
    positions: torch.Tensor
    attention: AttentionBatch
    lora: LoraSegments
    # The delta of the layer before, [rows, hidden].
    delta: torch.Tensor

    def calls(self, ops: ModuleType, with_lora: bool) -> list[Callable[[], torch.Tensor]]:
        """One call a layer, which returns its delta; kernels in one stream, as in an eager step."""
        backend = PagedAttention(
            ops, self.model, self.pool, self.page_tokens, self.model.max_position_embeddings
        )
        backend.plan(self.attention, self.positions)
        lora = self.lora if with_lora else None
        residual = torch.randn_like(self.delta)

        def call(layer: DecoderLayer) -> Callable[[], torch.Tensor]:
            return lambda: layer(self.delta, residual, backend, lora)

        return [
            call(DecoderLayer(self.model, index, layer, ops, self.pool))
            for index, layer in enumerate(self.weights.layers)
        ]


def make_prefill(
    model: ModelConfig,
    num_prompts: int,
    prompt_len: int,
    rank: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
) -> PrefillInputs:
    """The adapter has `rank` on all seven linears and random weights, as the base model."""
    model = replace(model, layers=model.layers[:NUM_LAYERS])
    engine = EngineConfig(dtype=dtype_name(dtype))
    geometry = AdapterGeometry.of(model, engine)
    layout = uniform_layout(geometry, geometry.module_names, rank)
    pages_per_prompt = -(-prompt_len // engine.page_tokens)
    num_kv_pages = num_prompts * pages_per_prompt
    num_pages = num_kv_pages + layout.num_pages
    generator = torch.Generator(device).manual_seed(seed)
    pool = torch.empty(num_pages, NUM_LAYERS, geometry.page_elems, dtype=dtype, device=device)
    pool.normal_(0.0, ADAPTER_STD, generator=generator)
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).int()
    rows = num_prompts * prompt_len
    return PrefillInputs(
        model,
        dummy_weights(model, device, dtype, seed),
        pool,
        engine.page_tokens,
        torch.arange(prompt_len).repeat(num_prompts).to(device),
        _attention(
            AttentionPlanner(model, dtype),
            order[:num_kv_pages].view(num_prompts, pages_per_prompt),
            prompt_len,
            engine.page_tokens,
            device,
        ),
        LoraSegments(
            seg_indptr=torch.tensor([0, rows], dtype=torch.int32, device=device),
            seg_slots=torch.zeros(1, dtype=torch.int32, device=device),
            page_tables=order[num_kv_pages:].view(1, -1).to(device),
            offsets=layout.offsets.unsqueeze(0).to(device),
            scaling=layout.scaling.unsqueeze(0).to(device),
            max_rank=bucket_of(rank, RANK_BUCKETS),
            modules=layout.modules,
            tiles=_tiles(rows, device),
        ),
        torch.randn(rows, model.hidden_size, dtype=dtype, device=device, generator=generator),
    )


def _attention(
    planner: AttentionPlanner,
    block_tables: torch.Tensor,
    prompt_len: int,
    page_tokens: int,
    device: torch.device,
) -> AttentionBatch:
    """Whole prompts, one a row of the block tables."""
    num_prompts = block_tables.shape[0]
    tokens, lens = torch.arange(prompt_len), [prompt_len] * num_prompts
    slots = block_tables[:, tokens // page_tokens] * page_tokens + tokens % page_tokens
    bounds = torch.arange(0, num_prompts * prompt_len + 1, prompt_len, dtype=torch.int32)
    return AttentionBatch(
        kv_places=slots.flatten().int().to(device),
        num_decodes=0,
        decode_block_tables=torch.empty(0, 1, dtype=torch.int32, device=device),
        decode_context_lens=torch.empty(0, dtype=torch.int32, device=device),
        query_indptr=bounds.to(device),
        prefill_block_tables=block_tables.to(device),
        prefill_context_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        prefill_plan=planner.prefill(lens, lens, planner.prefill_block_rows(lens)).to(device),
    )


def _tiles(rows: int, device: torch.device) -> LoraTiles:
    block_rows = choose_block_rows(rows, 1)
    return LoraTiles.of(plan_tiles([0, rows], [0], block_rows), block_rows, device=device)


def check_prefill(inputs: PrefillInputs, ops: Sequence[ModuleType], tolerance: float) -> None:
    """Raises AssertionError where the last layer with LoRA differs between two `ops`."""
    results = []
    for module in ops:
        torch.manual_seed(0)
        results.append(inputs.calls(module, with_lora=True)[-1]().float())
    assert_near("a layer's prefill", results[0], results[1], tolerance)
