"""What the file of a family gives, and the fields of Hugging Face configs that families share.

A reader takes the JSON object of a `config.json`; what the decoder lacks it refuses by name. Knows
no family.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slora_core.errors import UnsupportedModelError
from slora_core.models.config import (
    AttentionSpec,
    LayerNames,
    LayerSpec,
    Llama3RopeScaling,
    MLPSpec,
    RotarySpec,
)

HFConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """All models of one `model_type`."""

    model_type: str
    names: LayerNames
    layers: Callable[[HFConfig], tuple[LayerSpec, ...]]
    # What transformers takes a config to mean that lacks these fields.
    defaults: HFConfig = field(default_factory=dict)


def uniform_layers(
    config: HFConfig, attention: AttentionSpec, mlp: MLPSpec
) -> tuple[LayerSpec, ...]:
    """As many layers as the config says, all alike."""
    layer = LayerSpec(config["hidden_size"], attention, mlp, rms_norm_eps(config))
    return (layer,) * config["num_hidden_layers"]


def attention_spec(config: HFConfig, turns_part_of_heads: bool = False) -> AttentionSpec:
    """Full attention, with biases by `attention_bias`; rotary as `rotary_spec`."""
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    bias = bool(config.get("attention_bias", False))
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        rotary=rotary_spec(config, head_dim, turns_part_of_heads),
        qkv_bias=bias,
        o_bias=bias,
    )


def mlp_spec(config: HFConfig) -> MLPSpec:
    """With biases by `mlp_bias`."""
    for name in ("hidden_act", "hidden_activation"):
        activation = config.get(name) or "silu"
        if activation != "silu":
            raise UnsupportedModelError(f"{name} is {activation!r}; only 'silu' is supported")
    return MLPSpec(config["intermediate_size"], bool(config.get("mlp_bias", False)))


def rotary_spec(config: HFConfig, head_dim: int, turns_part_of_heads: bool) -> RotarySpec:
    """From `rope_parameters` (new) or `rope_scaling` (older configs)."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    fractions = (fields.get("partial_rotary_factor") for fields in (parameters, config))
    fraction = next((fraction for fraction in fractions if fraction is not None), 1.0)
    if fraction != 1.0 and not turns_part_of_heads:
        raise UnsupportedModelError(f"partial_rotary_factor is {fraction}; only 1.0 is supported")
    dim = int(head_dim * fraction)
    if dim % 2 or not 0 < dim <= head_dim:
        raise UnsupportedModelError(
            f"partial_rotary_factor is {fraction}; of a head_dim of {head_dim} it must make an "
            f"even number, at most {head_dim}"
        )
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return RotarySpec(dim, float(theta))
    if kind != "llama3":
        raise UnsupportedModelError(f"rope_type is {kind!r}; supported are 'default' and 'llama3'")
    scaling = Llama3RopeScaling(
        factor=parameters["factor"],
        low_freq_factor=parameters["low_freq_factor"],
        high_freq_factor=parameters["high_freq_factor"],
        original_max_position_embeddings=parameters["original_max_position_embeddings"],
    )
    return RotarySpec(dim, float(theta), scaling)


def rms_norm_eps(config: HFConfig) -> float:
    return config.get("rms_norm_eps", 1e-6)


def switched_window(config: HFConfig) -> int | None:
    """The sliding window of a config that says with `use_sliding_window` whether it is used."""
    if not config.get("use_sliding_window"):
        return None
    return config.get("sliding_window") or None
