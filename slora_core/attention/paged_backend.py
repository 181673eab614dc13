"""Attention over the unified pool through the ops of `kernels`, on any device that has them."""

from types import ModuleType

import torch

from slora_core.attention.batch import AttentionBatch
from slora_core.config import ModelConfig
from slora_core.layers.rotary import rotary_table


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
        num_pages, num_layers, _ = pool.shape
        self._ops = ops
        self._kv_cache = pool.view(
            num_pages, num_layers, 2, page_tokens, config.num_kv_heads, config.head_dim
        )
        self._cos_sin = rotary_table(config, num_positions, pool.dtype).to(pool.device)
        self._sm_scale = config.head_dim**-0.5
        self._batch: AttentionBatch | None = None
        self._positions: torch.Tensor | None = None

    def plan(self, batch: AttentionBatch, positions: torch.Tensor) -> None:
        self._batch = batch
        self._positions = positions

    def run(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch = self._batch
        assert batch is not None, "plan() comes before run()"
        self._ops.rotary_kv_write(
            q, k, v, self._cos_sin, self._positions, self._kv_cache, layer, batch.slot_mapping
        )
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        num_decodes = batch.num_decodes
        if num_decodes:
            self._ops.paged_decode(
                q[:num_decodes],
                self._kv_cache,
                layer,
                batch.decode_block_tables,
                batch.decode_context_lens,
                self._sm_scale,
                batch.decode_plan,
                out[:num_decodes],
            )
        if batch.num_prefills:
            self._ops.paged_prefill(
                q,
                self._kv_cache,
                layer,
                batch.query_indptr,
                batch.prefill_block_tables,
                batch.prefill_context_lens,
                self._sm_scale,
                batch.prefill_plan,
                out,
            )
        return out
