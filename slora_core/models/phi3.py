"""Phi-3 and Phi-4: q, k and v, and gate and up, are one matrix each, in adapters too.

Heads may be turned in part, and there may be a sliding window. LongRoPE is refused as every
scaling that the decoder lacks.
"""

from dataclasses import replace

from slora_core.models.config import (
    DOWN,
    GATE_UP,
    INPUT_NORM,
    O_PROJ,
    POST_NORM,
    QKV,
    LayerNames,
    LayerSpec,
    Projection,
)
from slora_core.models.family import Family, HFConfig, attention_spec, mlp_spec, uniform_layers

NAMES = LayerNames(
    projections=(
        Projection("self_attn.qkv_proj", QKV),
        Projection("self_attn.o_proj", O_PROJ),
        Projection("mlp.gate_up_proj", GATE_UP),
        Projection("mlp.down_proj", DOWN),
    ),
    norms=(
        ("input_layernorm", INPUT_NORM),
        ("post_attention_layernorm", POST_NORM),
    ),
)


def layers(config: HFConfig) -> tuple[LayerSpec, ...]:
    # No linear has a bias, whatever the config says.
    attention = replace(
        attention_spec(config, turns_part_of_heads=True),
        qkv_bias=False,
        o_bias=False,
        window=config.get("sliding_window") or None,
    )
    return uniform_layers(config, attention, replace(mlp_spec(config), bias=False))


PHI3 = Family("phi3", NAMES, layers, {"rms_norm_eps": 1e-5})
