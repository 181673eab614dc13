"""Phi-3 and Phi-4 as published; texts are compared in `engine/test_engine.py`."""

from typing import Any

import pytest

from slora_core.errors import UnsupportedModelError
from slora_core.models.config import AttentionSpec, LayerSpec, MLPSpec, ModelConfig, RotarySpec
from slora_core.models.registry import parse_model_config

# The fields of microsoft/Phi-3-mini-4k-instruct that matter, as its config.json has them.
PHI3_MINI = {
    "model_type": "phi3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
# What microsoft/phi-4 has otherwise.
PHI4 = {
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "max_position_embeddings": 16384,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384,
    "partial_rotary_factor": 1.0,
    "rope_theta": 250000,
    "sliding_window": None,
    "vocab_size": 100352,
}


def _parse(**changes: Any) -> ModelConfig:
    return parse_model_config({**PHI3_MINI, **changes}, {})


def test_published_phi3_mini() -> None:
    config = _parse()
    attention = AttentionSpec(32, 32, 96, RotarySpec(96), window=2047)
    assert config.layers == (LayerSpec(3072, attention, MLPSpec(8192), 1e-5),) * 32
    assert config.max_position_embeddings == 2047
    modules = zip(config.names.projections, config.module_dims[-1], strict=True)
    assert {projection.path: dims for projection, dims in modules} == {
        "self_attn.qkv_proj": (3072, 3 * 3072),
        "self_attn.o_proj": (3072, 3072),
        "mlp.gate_up_proj": (3072, 2 * 8192),
        "mlp.down_proj": (8192, 3072),
    }


def test_published_phi4() -> None:
    config = _parse(**PHI4)
    attention = AttentionSpec(40, 10, 128, RotarySpec(128, 250000.0))
    assert config.layers == (LayerSpec(5120, attention, MLPSpec(17920), 1e-5),) * 40
    assert config.max_position_embeddings == 16384
    assert config.module_dims[0][0] == (5120, 5120 + 2 * 1280)


def test_what_transformers_takes_missing_fields_to_mean() -> None:
    from transformers import Phi3Config

    missing = ("rms_norm_eps", "sliding_window", "rope_theta", "num_key_value_heads")
    bare = {name: value for name, value in PHI3_MINI.items() if name not in missing}
    config, theirs = parse_model_config(bare, {}), Phi3Config(**bare)
    attention = config.layers[0].attention
    assert config.rms_norm_eps == config.layers[0].norm_eps == theirs.rms_norm_eps
    assert attention.window is theirs.sliding_window is None
    assert attention.num_kv_heads == theirs.num_key_value_heads
    assert attention.rotary == RotarySpec(96, theirs.rope_parameters["rope_theta"])


@pytest.mark.parametrize(
    "fields",
    [
        {"partial_rotary_factor": 0.75},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}},
        {"rope_parameters": {"rope_type": "default"}, "partial_rotary_factor": 0.75},
    ],
)
def test_heads_turned_in_part(fields: dict[str, Any]) -> None:
    assert _parse(**fields).layers[0].attention.rotary == RotarySpec(72)


def test_no_linear_has_a_bias() -> None:
    layer = _parse(attention_bias=True, mlp_bias=True).layers[0]
    assert not any(linear.bias for linear in layer.linears.values())


@pytest.mark.parametrize(
    "changes,message",
    [
        # As microsoft/Phi-3-mini-128k-instruct and Phi-4-mini-instruct have it, older and newer.
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_type is 'longrope'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ({"rope_scaling": {"type": "su"}}, "rope_type is 'su'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"partial_rotary_factor": 0.33}, "partial_rotary_factor is 0.33; of a head_dim of 96"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor is 2.0; of a head_dim of 96"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
        ({"model_type": "phimoe"}, "model_type is 'phimoe'; supported are .*, phi3"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        _parse(**changes)
