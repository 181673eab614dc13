"""Mistral: Llama with a sliding window."""

from dataclasses import replace

from slora_core.models.config import LayerSpec
from slora_core.models.family import Family, HFConfig, attention_spec, mlp_spec, uniform_layers
from slora_core.models.llama import NAMES


def layers(config: HFConfig) -> tuple[LayerSpec, ...]:
    # There is no switch for it.
    attention = replace(attention_spec(config), window=config["sliding_window"] or None)
    return uniform_layers(config, attention, mlp_spec(config))


MISTRAL = Family("mistral", NAMES, layers, {"sliding_window": 4096})
