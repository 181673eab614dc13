"""Reads a Hugging Face directory's configs into a `ModelConfig`, by the file of its family.

What the decoder does not implement is refused by name.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slora_core.errors import UnsupportedModelError
from slora_core.models.config import LayerSpec, ModelConfig
from slora_core.models.family import HFConfig, rms_norm_eps
from slora_core.models.generation_defaults import GenerationDefaults, generation_defaults
from slora_core.models.llama import LLAMA
from slora_core.models.mistral import MISTRAL
from slora_core.models.phi3 import PHI3
from slora_core.models.qwen2 import QWEN2
from slora_core.models.qwen3 import QWEN3
from slora_core.tokenizer_files import GENERATION_FILE, TokenizerFiles, end_ids

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3)}


def load_model_config(model_dir: Path) -> ModelConfig:
    """Read `model_dir/config.json`, and what ends a text of its other files where there are any.

    Raises:
        UnsupportedModelError: no config or a damaged one, an unknown family, or an option that
            the decoder lacks.
    """
    path = model_dir / "config.json"
    if not path.is_file():
        raise UnsupportedModelError(f"{path} does not exist; a Hugging Face model directory has it")
    tokenizer_end = TokenizerFiles(model_dir).eos_token_id
    return parse_model_config(_read_object(path), _generation_config(model_dir), tokenizer_end)


def load_generation_defaults(model_dir: Path) -> GenerationDefaults:
    """How the model's files want its tokens chosen; raises as `generation_defaults`."""
    return generation_defaults(_generation_config(model_dir))


def _generation_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / GENERATION_FILE
    return _read_object(path) if path.is_file() else {}


def parse_model_config(
    config: HFConfig, generation: HFConfig, tokenizer_end: int | None = None
) -> ModelConfig:
    """Build a `ModelConfig` from the two JSON objects; raises as `load_model_config`.

    A text ends at what either of them says, and at the tokenizer's own end.
    """
    ends = [*end_ids(generation), *end_ids(config)]
    if tokenizer_end is not None:
        ends.append(tokenizer_end)
    try:
        return _model_config(config, ends)
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


def _model_config(config: HFConfig, end_token_ids: Sequence[int]) -> ModelConfig:
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"model_type is {model_type!r}; supported are {', '.join(FAMILIES)}"
        )
    _refuse_quantized(config)
    config = {**family.defaults, **config}
    layers = family.layers(config)
    _refuse_unlike_the_decoder(layers)
    windows = [layer.attention.window for layer in layers if layer.attention.window]
    return ModelConfig(
        vocab_size=config["vocab_size"],
        layers=layers,
        names=family.names,
        max_position_embeddings=min([config["max_position_embeddings"], *windows]),
        rms_norm_eps=rms_norm_eps(config),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        eos_token_ids=tuple(
            token_id
            for token_id in dict.fromkeys((*end_token_ids, *end_ids(config)))
            if 0 <= token_id < config["vocab_size"]
        ),
    )


def _refuse_quantized(config: HFConfig) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"quantization_config has quant_method {method!r}; only unquantized bases are supported"
        )


def _refuse_unlike_the_decoder(layers: tuple[LayerSpec, ...]) -> None:
    """What a specification can say and the one decoder does not compute."""
    for index, layer in enumerate(layers):
        if layer.mlp.activation != "silu":
            raise UnsupportedModelError(
                f"layer {index} has the activation {layer.mlp.activation!r}; the decoder has 'silu'"
            )
