"""Qwen3: norms on each head of q and k."""

from dataclasses import replace

from slora_core.models.config import LayerSpec
from slora_core.models.family import (
    Family,
    HFConfig,
    attention_spec,
    mlp_spec,
    switched_window,
    uniform_layers,
)
from slora_core.models.llama import NAMES


def layers(config: HFConfig) -> tuple[LayerSpec, ...]:
    attention = replace(attention_spec(config), qk_norm=True, window=switched_window(config))
    return uniform_layers(config, attention, mlp_spec(config))


QWEN3 = Family("qwen3", NAMES, layers)
