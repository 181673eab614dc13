"""Plans of a step's attention for one model: what `kernels.attention_plan` needs to know of it."""

from collections.abc import Sequence

import torch

from kernels.attention_launch import prefill_launches
from kernels.attention_plan import (
    DecodePlan,
    PrefillPlan,
    max_decode_items,
    plan_decode,
    plan_prefill,
    prefill_block_rows,
)
from slora_core.models.config import ModelConfig


class AttentionPlanner:
    """Plans once a step for all layers.

    Raises:
        UnsupportedModelError: layers of the model would need different plans.
    """

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        self._num_heads, self._num_kv_heads, head_dim = model.heads
        # Packed query rows of a tile of a prefill, of all that steps may choose.
        self.prefill_tiles = tuple(prefill_launches(head_dim, dtype))

    def decode(self, context_lens: Sequence[int]) -> DecodePlan:
        """Plan of decode rows, on the CPU; its sizes depend on the number of rows alone."""
        max_items = max_decode_items(len(context_lens), self._num_kv_heads)
        return plan_decode(context_lens, max_items)

    def prefill_block_rows(self, chunk_lens: Sequence[int]) -> int:
        """Packed query rows of a tile for chunks of these lengths."""
        return prefill_block_rows(
            chunk_lens, self._num_heads, self._num_kv_heads, max(self.prefill_tiles)
        )

    def max_prefill_tiles(self, num_rows: int, num_prefills: int, block_rows: int) -> int:
        """Tiles of so many chunks of so many rows together, at most."""
        group = self._num_heads // self._num_kv_heads
        return num_rows * group // block_rows + num_prefills

    def prefill(
        self, chunk_lens: Sequence[int], context_lens: Sequence[int], block_rows: int
    ) -> PrefillPlan:
        """Plan of chunks of prompts, on the CPU."""
        group = self._num_heads // self._num_kv_heads
        return plan_prefill(chunk_lens, context_lens, group, block_rows)
