"""One decoder for all families: what they differ in, `ModelConfig` says of each layer.

Computes logits of a `ForwardBatch`. Knows no scheduling and no sampling.
"""

from types import ModuleType

import torch
import torch.nn.functional as F

from kernels.lora_segments import LoraSegments
from slora_core.attention.backend import AttentionBackend
from slora_core.layers.lora import LoraLinear, lora_groups
from slora_core.models.config import (
    DOWN,
    GATE_UP,
    INPUT_NORM,
    K_NORM,
    O_PROJ,
    POST_NORM,
    Q_NORM,
    QKV,
    ModelConfig,
)
from slora_core.models.forward_batch import ForwardBatch
from slora_core.models.weights import DecoderWeights, LayerWeights


class DecoderLayer:
    """Attention and MLP with their norms; the residual stream is updated in place."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        weights: LayerWeights,
        ops: ModuleType,
        pool: torch.Tensor,
    ) -> None:
        groups = lora_groups(config, index)
        self._spec = config.layers[index]
        self._ops = ops
        self._index = index
        self._norms = weights.norms
        self._qkv, self._o, self._gate_up, self._down = (
            LoraLinear(weights.linears[name], ops, pool, index, groups[name])
            for name in (QKV, O_PROJ, GATE_UP, DOWN)
        )

    def __call__(
        self,
        delta: torch.Tensor | None,
        residual: torch.Tensor,
        attention: AttentionBackend,
        lora: LoraSegments | None,
    ) -> torch.Tensor:
        """Returns the layer's delta [rows, hidden], to be added to `residual` by the next norm.

        `delta` is the previous layer's (None before the first); `residual` is mutated.
        """
        eps, norms = self._spec.norm_eps, self._norms
        if delta is None:
            x = self._ops.rms_norm(residual, norms[INPUT_NORM], eps)
        else:
            x = self._ops.add_rms_norm(delta, residual, norms[INPUT_NORM], eps)
        attended = self._attend(x, attention, lora)
        x = self._ops.add_rms_norm(attended, residual, norms[POST_NORM], eps)
        return self._down(self._gate_up.silu_mul(x, lora), lora)

    def _attend(
        self, x: torch.Tensor, attention: AttentionBackend, lora: LoraSegments | None
    ) -> torch.Tensor:
        spec = self._spec.attention
        rows = x.shape[0]
        q, k, v = self._qkv(x, lora).split([spec.q_dim, spec.kv_dim, spec.kv_dim], dim=-1)
        q = q.reshape(rows, spec.num_heads, spec.head_dim)
        k = k.reshape(rows, spec.num_kv_heads, spec.head_dim)
        v = v.reshape(rows, spec.num_kv_heads, spec.head_dim)
        if spec.qk_norm:
            q = self._ops.rms_norm(q, self._norms[Q_NORM], self._spec.norm_eps)
            k = self._ops.rms_norm(k, self._norms[K_NORM], self._spec.norm_eps)
        attended = attention.run(self._index, q, k, v)
        return self._o(attended.reshape(rows, spec.q_dim), lora)


class Decoder:
    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, ops: ModuleType, pool: torch.Tensor
    ) -> None:
        self._config = config
        self._weights = weights
        self._ops = ops
        self._layers = [
            DecoderLayer(config, index, layer, ops, pool)
            for index, layer in enumerate(weights.layers)
        ]
        specs = config.layers
        self._num_until_every_kind = 1 + max(specs.index(spec) for spec in set(specs))

    def forward(
        self, batch: ForwardBatch, attention: AttentionBackend, num_layers: int | None = None
    ) -> torch.Tensor:
        """Logits [rows that sample, vocab_size], of the weights' dtype.

        `num_layers` computes the first layers alone, and as many more as make one of each kind:
        together they run every kernel there is.
        """
        attention.plan(batch.attention, batch.positions)
        residual = F.embedding(batch.input_ids, self._weights.embedding)
        delta = None
        if num_layers is not None:
            num_layers = max(num_layers, self._num_until_every_kind)
        for layer in self._layers[:num_layers]:
            delta = layer(delta, residual, attention, batch.lora)
        assert delta is not None
        if batch.logit_rows is not None:
            delta, residual = delta[batch.logit_rows], residual[batch.logit_rows]
        x = self._ops.add_rms_norm(
            delta, residual, self._weights.final_norm, self._config.rms_norm_eps
        )
        return self._weights.lm_head(x)
