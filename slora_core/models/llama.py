"""Llama 2 and 3, and what is built as they are."""

from slora_core.models.config import (
    DOWN,
    GATE_UP,
    INPUT_NORM,
    K_NORM,
    O_PROJ,
    POST_NORM,
    Q_NORM,
    QKV,
    LayerNames,
    LayerSpec,
    Projection,
)
from slora_core.models.family import Family, HFConfig, attention_spec, mlp_spec, uniform_layers

# Of most families: every matrix by itself.
NAMES = LayerNames(
    projections=(
        Projection("self_attn.q_proj", QKV, 0),
        Projection("self_attn.k_proj", QKV, 1),
        Projection("self_attn.v_proj", QKV, 2),
        Projection("self_attn.o_proj", O_PROJ),
        Projection("mlp.gate_proj", GATE_UP, 0),
        Projection("mlp.up_proj", GATE_UP, 1),
        Projection("mlp.down_proj", DOWN),
    ),
    norms=(
        ("input_layernorm", INPUT_NORM),
        ("post_attention_layernorm", POST_NORM),
        ("self_attn.q_norm", Q_NORM),
        ("self_attn.k_norm", K_NORM),
    ),
)


def layers(config: HFConfig) -> tuple[LayerSpec, ...]:
    return uniform_layers(config, attention_spec(config), mlp_spec(config))


LLAMA = Family("llama", NAMES, layers)
