"""Decoder weights: read from safetensors into fused matrices, or made at random.

Knows the names of Hugging Face checkpoints. Every tensor of the checkpoint is used or refused,
and every weight of the decoder is filled.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from slora_core.config import LORA_MODULES, ModelConfig
from slora_core.errors import UnsupportedModelError
from slora_core.layers.linear import DenseLinear, Linear
from slora_core.layers.lora import DOWN, GATE_UP, O_PROJ, QKV, lora_groups

# Standard deviation of dummy weights; never zeros, which flatter a GPU's clocks.
DUMMY_STD = 0.02

# Buffers of older checkpoints that the decoder computes itself.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


@dataclass
class LayerWeights:
    """One decoder layer: its linears by the names of `layers.lora`, and its norms.

    Norms are those before attention and MLP, of [hidden_size], and of queries and keys, of
    [head_dim], where the family has them.
    """

    linears: dict[str, Linear]
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


@dataclass
class DecoderWeights:
    embedding: torch.Tensor
    layers: list[LayerWeights]
    final_norm: torch.Tensor
    # Over the embedding itself where the two are tied.
    lm_head: Linear


def allocate_weights(
    config: ModelConfig, device: torch.device | str, dtype: torch.dtype
) -> DecoderWeights:
    """Uninitialized weights of the decoder's shape."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    def linear(in_features: int, out_features: int, bias: bool = False) -> DenseLinear:
        return DenseLinear(empty(out_features, in_features), empty(out_features) if bias else None)

    hidden, inner = config.hidden_size, config.intermediate_size
    q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def layer() -> LayerWeights:
        return LayerWeights(
            linears={
                QKV: linear(hidden, q_dim + 2 * kv_dim, config.qkv_bias),
                O_PROJ: linear(q_dim, hidden, config.o_bias),
                GATE_UP: linear(hidden, 2 * inner, config.mlp_bias),
                DOWN: linear(inner, hidden, config.mlp_bias),
            },
            input_norm=empty(hidden),
            post_norm=empty(hidden),
            q_norm=empty(config.head_dim) if config.qk_norm else None,
            k_norm=empty(config.head_dim) if config.qk_norm else None,
        )

    embedding = empty(config.vocab_size, hidden)
    return DecoderWeights(
        embedding=embedding,
        layers=[layer() for _ in range(config.num_layers)],
        final_norm=empty(hidden),
        lm_head=(
            DenseLinear(embedding)
            if config.tie_word_embeddings
            else linear(hidden, config.vocab_size)
        ),
    )


def checkpoint_views(config: ModelConfig, weights: DecoderWeights) -> dict[str, torch.Tensor]:
    """Where each tensor of a Hugging Face checkpoint goes: its name to a view of `weights`."""
    views = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.final_norm,
    }
    if not config.tie_word_embeddings:
        views |= _named("lm_head", weights.lm_head.rows(0, config.vocab_size))
    groups = lora_groups(config)
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        norms = {
            "input_layernorm": layer.input_norm,
            "post_attention_layernorm": layer.post_norm,
            "self_attn.q_norm": layer.q_norm,
            "self_attn.k_norm": layer.k_norm,
        }
        views |= {
            f"{prefix}{name}.weight": norm for name, norm in norms.items() if norm is not None
        }
        for name, group in groups.items():
            bounds = itertools.pairwise(group.out_offsets)
            for module, (start, end) in zip(group.modules, bounds, strict=True):
                block = "self_attn" if name in (QKV, O_PROJ) else "mlp"
                path = f"{prefix}{block}.{LORA_MODULES[module]}"
                views |= _named(path, layer.linears[name].rows(start, end))
    return views


def _named(path: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{path}.{suffix}": tensor for suffix, tensor in tensors.items()}


def load_weights(
    model_dir: Path, config: ModelConfig, device: torch.device | str, dtype: torch.dtype
) -> DecoderWeights:
    """Stream a checkpoint's safetensors into fused weights, one tensor in memory at a time.

    Raises:
        UnsupportedModelError: no safetensors, a damaged file, a tensor of the checkpoint that
            the decoder does not use, one that it lacks, or a shape that does not match.
    """
    weights = allocate_weights(config, device, dtype)
    views = checkpoint_views(config, weights)
    for name, tensor in _checkpoint_tensors(model_dir):
        view = views.pop(name, None)
        if view is None:
            tied_head = config.tie_word_embeddings and name == "lm_head.weight"
            if tied_head or name.endswith(_IGNORED_SUFFIXES):
                continue
            raise UnsupportedModelError(
                f"{model_dir} has the tensor {name!r}, which a {config.num_layers}-layer decoder "
                "of this family does not use"
            )
        if view.shape != tensor.shape:
            raise UnsupportedModelError(
                f"{name!r} in {model_dir} has shape {tuple(tensor.shape)}; the config says "
                f"{tuple(view.shape)}"
            )
        view.copy_(tensor)
    if views:
        raise UnsupportedModelError(
            f"{model_dir} lacks {len(views)} tensors, {min(views)!r} among them"
        )
    return weights


def dummy_weights(
    config: ModelConfig, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> DecoderWeights:
    """Random weights of the decoder's shape, for benchmarks: normal matrices, unit norms."""
    weights = allocate_weights(config, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, view in checkpoint_views(config, weights).items():
        if "norm" in name:
            view.fill_(1.0)
        else:
            view.normal_(0.0, DUMMY_STD, generator=generator)
    return weights


def _checkpoint_tensors(model_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    index_path = model_dir / "model.safetensors.index.json"
    if index_path.is_file():
        files = sorted(set(json.loads(index_path.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    for file in files:
        path = model_dir / file
        if not path.is_file():
            raise UnsupportedModelError(f"{path} does not exist; weights are read from safetensors")
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise UnsupportedModelError(f"{path} is damaged: {error}") from error
