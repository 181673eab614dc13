"""Reads a Hugging Face `config.json` into a `ModelConfig`.

Families are flags of one decoder. What the decoder does not implement is refused by name.
"""

import json
from pathlib import Path
from typing import Any

from slora_core.config import Llama3RopeScaling, ModelConfig
from slora_core.errors import UnsupportedModelError

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def load_model_config(model_dir: Path) -> ModelConfig:
    """Read `model_dir/config.json` and `generation_config.json` where there is one.

    Raises:
        UnsupportedModelError: no config or a damaged one, an unknown family, or an option that
            the decoder lacks.
    """
    path = model_dir / "config.json"
    if not path.is_file():
        raise UnsupportedModelError(f"{path} does not exist; a Hugging Face model directory has it")
    generation_path = model_dir / "generation_config.json"
    generation = _read_object(generation_path) if generation_path.is_file() else {}
    return parse_model_config(_read_object(path), generation)


def parse_model_config(config: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """Build a `ModelConfig` from the two JSON objects; raises as `load_model_config`."""
    try:
        return _model_config(config, generation)
    except KeyError as error:
        raise UnsupportedModelError(f"the model's config.json lacks {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UnsupportedModelError(f"{path} must hold a JSON object")
    return fields


def _model_config(config: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    family = config.get("model_type")
    if family not in SUPPORTED_FAMILIES:
        raise UnsupportedModelError(
            f"model_type is {family!r}; supported are {', '.join(SUPPORTED_FAMILIES)}"
        )
    _refuse_unsupported(config)
    num_heads = config["num_attention_heads"]
    hidden_size = config["hidden_size"]
    attention_bias = bool(config.get("attention_bias", False))
    theta, scaling = _rope(config)
    return ModelConfig(
        vocab_size=config["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or hidden_size // num_heads,
        max_position_embeddings=_context_limit(config),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        # Qwen2 has biases on q, k and v whatever its config says; the others by attention_bias.
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=family != "qwen2" and attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        eos_token_ids=_eos_token_ids(config, generation),
    )


def _refuse_unsupported(config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"quantization_config has quant_method {method!r}; only unquantized bases are supported"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"hidden_act is {activation!r}; only 'silu' is supported")
    fraction = config.get("partial_rotary_factor", 1.0)
    if fraction != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor is {fraction}; only 1.0 is supported")


def _rope(config: dict[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    """Rotary base and scaling, from `rope_parameters` (new) or `rope_scaling` (older configs)."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UnsupportedModelError(f"rope_type is {kind!r}; supported are 'default' and 'llama3'")
    return float(theta), Llama3RopeScaling(
        factor=parameters["factor"],
        low_freq_factor=parameters["low_freq_factor"],
        high_freq_factor=parameters["high_freq_factor"],
        original_max_position_embeddings=parameters["original_max_position_embeddings"],
    )


def _context_limit(config: dict[str, Any]) -> int:
    """Tokens of context: within a sliding window full attention is the same attention."""
    limit = config["max_position_embeddings"]
    is_mistral = config["model_type"] == "mistral"
    # What transformers takes a config to mean that does not say: Mistral has a window of 4096 and
    # no switch for it, the others have none.
    window = config.get("sliding_window", 4096 if is_mistral else None)
    if window and config.get("use_sliding_window", is_mistral):
        return min(limit, window)
    return limit


def _eos_token_ids(config: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)
