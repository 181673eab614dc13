"""Decoder weights: read from safetensors into fused matrices, or made at random.

Knows the names of Hugging Face checkpoints. Every tensor of the checkpoint is used or refused,
and every weight of the decoder is filled.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from slora_core.config import ModelConfig
from slora_core.errors import UnsupportedModelError

# Standard deviation of dummy weights; never zeros, which flatter a GPU's clocks.
DUMMY_STD = 0.02

# Buffers of older checkpoints that the decoder computes itself.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


@dataclass
class LayerWeights:
    """One decoder layer; matrices [out_features, in_features], fused along out_features."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass
class DecoderWeights:
    embedding: torch.Tensor
    layers: list[LayerWeights]
    final_norm: torch.Tensor
    # The embedding itself where the two are tied.
    lm_head: torch.Tensor


def allocate_weights(
    config: ModelConfig, device: torch.device | str, dtype: torch.dtype
) -> DecoderWeights:
    """Uninitialized weights of the decoder's shape."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    hidden, inner = config.hidden_size, config.intermediate_size
    q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=empty(hidden),
            qkv=empty(q_dim + 2 * kv_dim, hidden),
            qkv_bias=empty(q_dim + 2 * kv_dim) if config.qkv_bias else None,
            q_norm=empty(config.head_dim) if config.qk_norm else None,
            k_norm=empty(config.head_dim) if config.qk_norm else None,
            o=empty(hidden, q_dim),
            o_bias=empty(hidden) if config.o_bias else None,
            post_norm=empty(hidden),
            gate_up=empty(2 * inner, hidden),
            gate_up_bias=empty(2 * inner) if config.mlp_bias else None,
            down=empty(hidden, inner),
            down_bias=empty(hidden) if config.mlp_bias else None,
        )

    embedding = empty(config.vocab_size, hidden)
    return DecoderWeights(
        embedding=embedding,
        layers=[layer() for _ in range(config.num_layers)],
        final_norm=empty(hidden),
        lm_head=embedding if config.tie_word_embeddings else empty(config.vocab_size, hidden),
    )


def checkpoint_views(config: ModelConfig, weights: DecoderWeights) -> dict[str, torch.Tensor]:
    """Where each tensor of a Hugging Face checkpoint goes: its name to a view of `weights`."""
    views = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.final_norm,
    }
    if not config.tie_word_embeddings:
        views["lm_head.weight"] = weights.lm_head
    q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        plain = {
            "input_layernorm.weight": layer.input_norm,
            "post_attention_layernorm.weight": layer.post_norm,
            "self_attn.q_norm.weight": layer.q_norm,
            "self_attn.k_norm.weight": layer.k_norm,
            "self_attn.o_proj.weight": layer.o,
            "self_attn.o_proj.bias": layer.o_bias,
            "mlp.down_proj.weight": layer.down,
            "mlp.down_proj.bias": layer.down_bias,
        }
        for suffix, fused in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
            if fused is not None:
                parts = fused.split([q_dim, kv_dim, kv_dim])
                for name, part in zip("qkv", parts, strict=True):
                    plain[f"self_attn.{name}_proj.{suffix}"] = part
        for suffix, fused in (("weight", layer.gate_up), ("bias", layer.gate_up_bias)):
            if fused is not None:
                gate, up = fused.chunk(2)
                plain[f"mlp.gate_proj.{suffix}"] = gate
                plain[f"mlp.up_proj.{suffix}"] = up
        views.update({prefix + name: view for name, view in plain.items() if view is not None})
    return views


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
