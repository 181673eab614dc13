"""Configs of the supported families, as transformers writes them and as the hub has them."""

import json
from pathlib import Path

import pytest

from slora_core.errors import UnsupportedModelError
from slora_core.models.config import (
    AttentionSpec,
    LayerSpec,
    Llama3RopeScaling,
    MLPSpec,
    RotarySpec,
)
from slora_core.models.registry import load_model_config, parse_model_config
from tests.factories import LLAMA3_ROPE, MODEL_FAMILIES, make_model

# The fields of meta-llama/Llama-3.2-1B-Instruct that matter, as its config.json has them.
LLAMA_32_1B = {
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}


def _parse(generation: dict | None = None, **changes):
    return parse_model_config({**LLAMA_32_1B, **changes}, generation or {})


def test_published_llama() -> None:
    config = _parse()
    rotary = RotarySpec(64, 500000.0, Llama3RopeScaling(32.0, 1.0, 4.0, 8192))
    layer = LayerSpec(2048, AttentionSpec(32, 8, 64, rotary), MLPSpec(8192), norm_eps=1e-5)
    assert config.layers == (layer,) * 16
    assert (config.vocab_size, config.max_position_embeddings) == (128256, 131072)
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (128001, 128008, 128009)


@pytest.mark.parametrize("family", MODEL_FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_as_transformers_writes_it(tmp_path: Path, family: str, tied: bool) -> None:
    from transformers import AutoConfig

    path = make_model(tmp_path, family, tie_word_embeddings=tied, rope_theta=5000.0)
    config, hf = load_model_config(path), AutoConfig.from_pretrained(path)
    head_dim = 32 if family in ("qwen3", "phi3") else 16
    attention = AttentionSpec(
        4,
        2,
        head_dim,
        RotarySpec(head_dim // 2 if family == "phi3" else head_dim, 5000.0),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )
    layer = LayerSpec(64, attention, MLPSpec(96), norm_eps=hf.rms_norm_eps)
    assert config.layers == (layer,) * hf.num_hidden_layers
    assert config.rms_norm_eps == hf.rms_norm_eps
    assert config.tie_word_embeddings is tied
    assert config.eos_token_ids == (2,)


def test_scaling_in_either_spelling(tmp_path: Path) -> None:
    expected = RotarySpec(16, 777.0, Llama3RopeScaling(8.0, 1.0, 4.0, 32))
    path = make_model(tmp_path, "llama", rope_scaling=LLAMA3_ROPE, rope_theta=777.0)
    assert load_model_config(path).layers[0].attention.rotary == expected
    for key in ("rope_type", "type"):
        scaling = {key if name == "rope_type" else name: v for name, v in LLAMA3_ROPE.items()}
        older = _parse(rope_scaling=scaling, rope_theta=777.0, head_dim=16)
        assert older.layers[0].attention.rotary == expected


def test_fields_that_may_be_missing_or_null() -> None:
    config = _parse(num_key_value_heads=None, head_dim=None, rope_scaling=None, rope_theta=None)
    assert config.heads == (32, 32, 2048 // 32)
    assert config.layers[0].attention.rotary == RotarySpec(64, 10000.0)
    bare = {
        key: value
        for key, value in LLAMA_32_1B.items()
        if key not in ("rope_scaling", "rope_theta", "tie_word_embeddings", "eos_token_id")
    }
    config = parse_model_config(bare, {})
    assert (config.tie_word_embeddings, config.eos_token_ids) == (False, ())


@pytest.mark.parametrize(
    "generation,eos",
    [
        ({}, (128001, 128008, 128009)),
        ({"eos_token_id": 7}, (7, 128001, 128008, 128009)),
        ({"eos_token_id": [7, 128009]}, (7, 128009, 128001, 128008)),
        # What the model's own config says counts still.
        ({"eos_token_id": None}, (128001, 128008, 128009)),
        ({"temperature": 0.6}, (128001, 128008, 128009)),
        # No tokens of the model.
        ({"eos_token_id": [-1, 10**6, True, "7"]}, (128001, 128008, 128009)),
    ],
)
def test_a_text_ends_at_what_either_config_says(
    tmp_path: Path, generation: dict, eos: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_32_1B))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_model_config(tmp_path).eos_token_ids == eos


@pytest.mark.parametrize(
    "files",
    [
        {
            "tokenizer_config.json": {
                "eos_token": "<end>",
                "added_tokens_decoder": {"77": {"content": "<end>"}},
            }
        },
        {
            "tokenizer_config.json": {"eos_token": {"content": "<end>"}},
            "tokenizer.json": {"added_tokens": [{"id": 77, "content": "<end>"}]},
        },
        {
            "special_tokens_map.json": {"eos_token": "<end>"},
            "tokenizer.json": {"model": {"vocab": {"a": 0, "<end>": 77}}},
        },
        {
            "tokenizer_config.json": {"eos_token": "b"},
            "tokenizer.json": {
                "model": {"vocab": [[f"t{i}", 0.0] for i in range(77)] + [["b", 0]]}
            },
        },
    ],
)
def test_and_at_the_tokenizers_own_end(tmp_path: Path, files: dict) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_32_1B))
    for name, fields in files.items():
        (tmp_path / name).write_text(json.dumps(fields))
    assert load_model_config(tmp_path).eos_token_ids == (128001, 128008, 128009, 77)


@pytest.mark.parametrize("broken", ["", "[", "[1]", '{"eos_token": 5}', '{"eos_token": "<end>"}'])
def test_tokenizer_files_that_say_nothing_change_nothing(tmp_path: Path, broken: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_32_1B))
    for name in ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"):
        (tmp_path / name).write_text(broken)
    assert load_model_config(tmp_path).eos_token_ids == (128001, 128008, 128009)


def test_biases() -> None:
    llama = _parse(attention_bias=True, mlp_bias=True).layers[0]
    assert llama.attention.qkv_bias and llama.attention.o_bias and llama.mlp.bias
    qwen2 = _parse(model_type="qwen2").layers[0]
    assert qwen2.attention.qkv_bias and not qwen2.attention.o_bias and not qwen2.mlp.bias
    qwen3 = _parse(model_type="qwen3", attention_bias=True).layers[0].attention
    assert qwen3.qkv_bias and qwen3.o_bias and qwen3.qk_norm


@pytest.mark.parametrize(
    "changes,context",
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 4096),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, 131072),
        ({"model_type": "mistral", "sliding_window": 10**6}, 131072),
        # As published for Qwen2.5: a window that is switched off.
        ({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": False}, 131072),
        ({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": True}, 1024),
        # transformers leaves it off where a Qwen config does not say.
        ({"model_type": "qwen2", "sliding_window": 1024}, 131072),
        ({"model_type": "qwen3", "sliding_window": 1024}, 131072),
    ],
)
def test_context_ends_with_the_sliding_window(changes: dict, context: int) -> None:
    assert _parse(**changes).max_position_embeddings == context


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; supported are llama, mistral, qwen2"),
        ({"model_type": None}, "model_type is None"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5; only 1.0",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "lacks 'factor'"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        _parse(**changes)


@pytest.mark.parametrize(
    "text,message",
    [
        (None, "config.json does not exist"),
        ("{not json", "config.json is not valid JSON"),
        ("[]", "config.json must hold a JSON object"),
        (json.dumps({"model_type": "llama"}), "lacks 'num_attention_heads'"),
    ],
)
def test_damaged_configs(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModelError, match=message):
        load_model_config(tmp_path)
