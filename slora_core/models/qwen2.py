"""Qwen2 and Qwen2.5: biases on q, k and v."""

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
    # Whatever the config says of biases.
    attention = replace(
        attention_spec(config), qkv_bias=True, o_bias=False, window=switched_window(config)
    )
    return uniform_layers(config, attention, mlp_spec(config))


QWEN2 = Family("qwen2", NAMES, layers)
