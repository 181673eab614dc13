"""The narrow interface between the decoder and an attention implementation."""

from typing import Protocol

import torch

from slora_core.attention.batch import AttentionBatch


class AttentionBackend(Protocol):
    """Rotates, writes and attends against the unified pool; plans once a step, runs per layer."""

    def plan(self, batch: AttentionBatch, positions: torch.Tensor) -> None:
        """Prepare what all layers of the step share. `positions` int32 or int64 [rows]."""

    def run(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention output [rows, num_heads, head_dim]; q and k may be mutated.

        q is [rows, num_heads, head_dim], k and v [rows, num_kv_heads, head_dim], not rotated yet.
        """
