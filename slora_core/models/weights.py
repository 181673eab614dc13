"""Decoder weights: read from safetensors into fused matrices, or made at random.

Knows what Hugging Face checkpoints have in common; what one family calls the parts of its layers,
the config says. Every tensor of the checkpoint is used or refused, and every weight is filled.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from slora_core.errors import UnsupportedModelError
from slora_core.layers.linear import DenseLinear, Linear
from slora_core.models.config import LayerSpec, LinearSpec, ModelConfig

# Standard deviation of dummy weights; never zeros, which flatter a GPU's clocks.
DUMMY_STD = 0.02

# Buffers of older checkpoints that the decoder computes itself.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


@dataclass
class LayerWeights:
    """One decoder layer: its linears and its norms, by the names of `LayerSpec`."""

    linears: dict[str, Linear]
    norms: dict[str, torch.Tensor]


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

    def linear(spec: LinearSpec) -> DenseLinear:
        weight = empty(spec.out_features, spec.in_features)
        return DenseLinear(weight, empty(spec.out_features) if spec.bias else None)

    def layer(spec: LayerSpec) -> LayerWeights:
        return LayerWeights(
            linears={name: linear(part) for name, part in spec.linears.items()},
            norms={name: empty(size) for name, size in spec.norms.items()},
        )

    shape = config.vocab_size, config.hidden_size
    embedding = empty(*shape)
    return DecoderWeights(
        embedding=embedding,
        layers=[layer(spec) for spec in config.layers],
        final_norm=empty(config.hidden_size),
        lm_head=DenseLinear(embedding if config.tie_word_embeddings else empty(*shape)),
    )


def checkpoint_views(config: ModelConfig, weights: DecoderWeights) -> dict[str, torch.Tensor]:
    """Where each tensor of a Hugging Face checkpoint goes: its name to a view of `weights`."""
    views = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.final_norm,
    }
    if not config.tie_word_embeddings:
        views |= _named("lm_head", weights.lm_head.rows(0, config.vocab_size))
    for index, (spec, layer) in enumerate(zip(config.layers, weights.layers, strict=True)):
        prefix = f"model.layers.{index}."
        for path, norm in config.names.norms:
            if norm in layer.norms:
                views[f"{prefix}{path}.weight"] = layer.norms[norm]
        for projection in config.names.projections:
            if projection.linear in layer.linears:
                rows = projection.rows(spec.linears[projection.linear])
                tensors = layer.linears[projection.linear].rows(*rows)
                views |= _named(prefix + projection.path, tensors)
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


def checkpoint_files(model_dir: Path) -> list[Path]:
    """Where a checkpoint's tensors are, be the files there or not."""
    index_path = model_dir / "model.safetensors.index.json"
    if not index_path.is_file():
        return [model_dir / "model.safetensors"]
    names = set(json.loads(index_path.read_text())["weight_map"].values())
    return [model_dir / name for name in sorted(names)]


def _checkpoint_tensors(model_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in checkpoint_files(model_dir):
        if not path.is_file():
            raise UnsupportedModelError(f"{path} does not exist; weights are read from safetensors")
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise UnsupportedModelError(f"{path} is damaged: {error}") from error
