"""Attention over the unified pool through the ops of `kernels`, on any device that has them."""

from types import ModuleType
from typing import NamedTuple

import torch

from slora_core.attention.batch import AttentionBatch
from slora_core.layers.rotary import rotary_table
from slora_core.models.config import AttentionSpec, ModelConfig


class _LayerState(NamedTuple):
    # [num_pages, num_layers, 2 (K, V), page_tokens, num_kv_heads, head_dim], views of the pool.
    kv_cache: torch.Tensor
    # [num_positions, dims that are turned]
    cos_sin: torch.Tensor
    sm_scale: float


class PagedAttention:
    """Decode rows by `paged_decode`, prefill chunks by `paged_prefill`."""

    def __init__(
        self,
        ops: ModuleType,
        config: ModelConfig,
        pool: torch.Tensor,
        page_tokens: int,
        num_positions: int,
    ) -> None:
        specs = [layer.attention for layer in config.layers]
        tables = {
            rotary: rotary_table(rotary, num_positions, pool.dtype).to(pool.device)
            for rotary in {spec.rotary for spec in specs}
        }
        self._ops = ops
        self._layers = [
            _LayerState(
                _kv_cache(pool, spec, page_tokens), tables[spec.rotary], spec.head_dim**-0.5
            )
            for spec in specs
        ]
        self._batch: AttentionBatch | None = None
        self._positions: torch.Tensor | None = None

    def plan(self, batch: AttentionBatch, positions: torch.Tensor) -> None:
        self._batch = batch
        self._positions = positions

    def run(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch = self._batch
        assert batch is not None, "plan() comes before run()"
        kv_cache, cos_sin, sm_scale = self._layers[layer]
        self._ops.rotary_kv_write(
            q, k, v, cos_sin, self._positions, kv_cache, layer, batch.kv_places
        )
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        num_decodes = batch.num_decodes
        if num_decodes:
            self._ops.paged_decode(
                q[:num_decodes],
                kv_cache,
                layer,
                batch.decode_block_tables,
                batch.decode_context_lens,
                sm_scale,
                batch.decode_plan,
                out[:num_decodes],
            )
        if batch.num_prefills:
            self._ops.paged_prefill(
                q,
                kv_cache,
                layer,
                batch.query_indptr,
                batch.prefill_block_tables,
                batch.prefill_context_lens,
                sm_scale,
                batch.prefill_plan,
                out,
            )
        return out


def _kv_cache(pool: torch.Tensor, spec: AttentionSpec, page_tokens: int) -> torch.Tensor:
    """The pool's pages as KV; of a layer with fewer heads than the largest, the rest is unused."""
    num_pages, num_layers, _ = pool.shape
    elems = 2 * page_tokens * spec.kv_dim
    shape = num_pages, num_layers, 2, page_tokens, spec.num_kv_heads, spec.head_dim
    return pool[:, :, :elems].view(shape)
