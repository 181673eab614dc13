"""Whether a step with prompts is better replayed as a graph of decodes or launched bit by bit.

A graph starts at once, but prompts in it read their context once for every token. Without one the
host launches each kernel, which takes longer than a small step does on the device. The constants
are of an H100 and its host; where they are wrong, a step takes a few milliseconds more.
"""

from collections.abc import Sequence

from slora_core.config import EngineConfig, ModelConfig
from slora_core.memory.sizing import page_bytes
from slora_core.types import ScheduledChunk

# Seconds of the host to launch one layer, for the base model and with adapters.
_HOST_LAYER_S = 0.5e-3
_HOST_LORA_LAYER_S = 0.9e-3
# What weights and KV are read with, and what prompts are multiplied with.
_BYTES_PER_S = 2.5e12
_FLOPS = 600e12


class StepCost:
    """Estimates for one model."""

    def __init__(self, model: ModelConfig, engine: EngineConfig) -> None:
        num_weights = model.num_layers * sum(n * m for n, m in model.module_dims)
        self._num_layers = model.num_layers
        self._token_bytes = page_bytes(model, engine) / engine.page_tokens
        self._weights_s = num_weights * engine.dtype.itemsize / _BYTES_PER_S
        self._row_s = 2 * num_weights / _FLOPS

    def graph_pays(self, chunks: Sequence[ScheduledChunk], *, lora: bool) -> bool:
        """Whether reading contexts again takes less time than the host's launches would add."""
        num_read = num_reread = num_rows = 0
        for chunk in chunks:
            length = chunk.end - chunk.start
            num_read += chunk.end
            if length > 1:
                num_rows += length
                num_reread += length * (chunk.start + chunk.end) // 2 - chunk.end
        host_s = self._num_layers * (_HOST_LORA_LAYER_S if lora else _HOST_LAYER_S)
        device_s = self._seconds(num_read) + self._weights_s + num_rows * self._row_s
        return self._seconds(num_reread) <= max(0.0, host_s - device_s)

    def _seconds(self, num_tokens: int) -> float:
        """To read the KV of so many tokens in all layers."""
        return num_tokens * self._token_bytes / _BYTES_PER_S
