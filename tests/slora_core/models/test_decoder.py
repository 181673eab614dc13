"""Layers that are not alike: pages, adapters and texts against a naive decoder in fp64.

What families there are is compared with transformers in `engine/test_engine.py`.
"""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kernels import torch_ops
from slora_core.adapters.page_layout import (
    AdapterGeometry,
    LoraWeights,
    PackedAdapter,
    pack_adapter,
    plan_layout,
)
from slora_core.attention.planner import AttentionPlanner
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.errors import UnsupportedModelError
from slora_core.models.config import AttentionSpec, LayerSpec, MLPSpec, ModelConfig, RotarySpec
from slora_core.models.decoder import Decoder
from slora_core.models.forward_batch import ForwardBatch
from slora_core.models.llama import NAMES
from slora_core.models.weights import DecoderWeights, allocate_weights, checkpoint_views
from slora_core.requests import Request, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN = 64
LAYERS = (
    LayerSpec(HIDDEN, AttentionSpec(4, 2, 16, RotarySpec(16)), MLPSpec(96)),
    LayerSpec(
        HIDDEN,
        AttentionSpec(6, 3, 32, RotarySpec(16, 500.0), qkv_bias=True, qk_norm=True),
        MLPSpec(160, bias=True),
        norm_eps=1e-5,
    ),
    LayerSpec(HIDDEN, AttentionSpec(2, 1, 32, RotarySpec(32)), MLPSpec(32)),
)
MODEL = ModelConfig(128, LAYERS, NAMES, max_position_embeddings=128)
CONFIG = EngineConfig(num_pool_tokens=1024, max_batched_tokens=24)
# Matrices by layer and path.
Deltas = Mapping[tuple[int, str], torch.Tensor]


def _weights() -> DecoderWeights:
    weights = allocate_weights(MODEL, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, view in checkpoint_views(MODEL, weights).items():
        view.normal_(float("norm" in name), 0.15, generator=generator)
    return weights


def _adapter(geometry: AdapterGeometry) -> tuple[PackedAdapter, Deltas]:
    """On all modules but some of the first layer's, and what it adds to the base's matrices."""
    generator = torch.Generator().manual_seed(1)
    weights, deltas = {}, {}
    for layer, layer_dims in enumerate(geometry.module_dims):
        for module, (in_features, out_features) in enumerate(layer_dims):
            if layer == 0 and module % 2:
                continue
            rank = 3 + layer + module
            a = torch.randn(rank, in_features, generator=generator) * 0.1
            b = torch.randn(out_features, rank, generator=generator) * 0.1
            weights[layer, module] = LoraWeights(a, b, scaling=2.0)
            deltas[layer, geometry.modules[module]] = 2.0 * b.double() @ a.double()
    ranks = {key: lora.rank for key, lora in weights.items()}
    layout = plan_layout(geometry, ranks, dict.fromkeys(ranks, 2.0))
    return PackedAdapter("unlike", layout, pack_adapter(geometry, layout, weights)), deltas


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _turned(x: torch.Tensor, rotary: RotarySpec) -> torch.Tensor:
    """x [tokens, heads, head_dim], its first dims turned as complex numbers."""
    half = rotary.dim // 2
    angles = torch.arange(len(x)).double().outer(rotary.theta ** -(torch.arange(half) / half))
    turned = torch.complex(x[..., :half], x[..., half : rotary.dim])
    turned = turned * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return torch.cat((turned.real, turned.imag, x[..., rotary.dim :]), -1)


def _naive_layer(
    x: torch.Tensor, spec: LayerSpec, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    def linear(path: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, tensors[path + ".weight"], tensors.get(path + ".bias"))

    attention, num_tokens = spec.attention, len(x)
    normed = _norm(x, tensors["input_layernorm.weight"], spec.norm_eps)
    q, k, v = (
        linear(f"self_attn.{name}_proj", normed).view(num_tokens, -1, attention.head_dim)
        for name in "qkv"
    )
    if attention.qk_norm:
        q = _norm(q, tensors["self_attn.q_norm.weight"], spec.norm_eps)
        k = _norm(k, tensors["self_attn.k_norm.weight"], spec.norm_eps)
    q, k = _turned(q, attention.rotary), _turned(k, attention.rotary)
    group = attention.num_heads // attention.num_kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / attention.head_dim**0.5
    future = torch.ones(num_tokens, num_tokens).triu(1).bool()
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    x = x + linear("self_attn.o_proj", torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    normed = _norm(x, tensors["post_attention_layernorm.weight"], spec.norm_eps)
    inner = F.silu(linear("mlp.gate_proj", normed)) * linear("mlp.up_proj", normed)
    return x + linear("mlp.down_proj", inner)


def _naive_text(
    weights: DecoderWeights, deltas: Deltas, prompt_ids: list[int], max_tokens: int
) -> list[int]:
    tensors = {name: view.double() for name, view in checkpoint_views(MODEL, weights).items()}
    for (layer, path), delta in deltas.items():
        tensors[f"model.layers.{layer}.{path}.weight"] += delta
    ids = list(prompt_ids)
    for _ in range(max_tokens):
        x = tensors["model.embed_tokens.weight"][ids]
        for index, spec in enumerate(LAYERS):
            prefix = f"model.layers.{index}."
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if prefix in name}
            x = _naive_layer(x, spec, own)
        x = _norm(x[-1], tensors["model.norm.weight"], MODEL.rms_norm_eps)
        ids.append(int((tensors["lm_head.weight"] @ x).argmax()))
    return ids[len(prompt_ids) :]


def test_texts_of_unlike_layers() -> None:
    weights = _weights()
    engine = Engine(MODEL, CONFIG, weights)
    adapter, deltas = _adapter(engine.geometry)
    engine.add_adapter(adapter)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    prompts = [list(range(3, 20)), list(range(50, 90)), [7]]
    kinds = [(kind, prompt) for prompt in prompts for kind in (None, "unlike")]
    texts = engine.generate([Request(prompt, params, kind) for kind, prompt in kinds])
    for (kind, prompt), text in zip(kinds, texts, strict=True):
        assert text == _naive_text(weights, deltas if kind else {}, prompt, 12)
    assert texts[::2] != texts[1::2]


class _SpyAttention:
    """Attention that only counts layers."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def plan(self, batch: object, positions: torch.Tensor) -> None:
        pass

    def run(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.layers.append(layer)
        return q


@pytest.mark.parametrize(
    "kinds,expected", [("aaa", [0]), ("aabac", [0, 1, 2, 3, 4]), ("aba", [0, 1])]
)
def test_first_layers_are_at_least_one_of_each_kind(kinds: str, expected: list[int]) -> None:
    model = replace(MODEL, layers=tuple(LAYERS["abc".index(kind)] for kind in kinds))
    weights = allocate_weights(model, "cpu", torch.float32)
    decoder = Decoder(model, weights, torch_ops, torch.empty(0))
    spy, ids = _SpyAttention(), torch.zeros(2, dtype=torch.int32)
    decoder.forward(ForwardBatch(ids, ids, None, None, None), spy, num_layers=1)
    assert spy.layers == expected


def test_a_page_holds_the_tokens_of_the_largest_layer() -> None:
    assert CONFIG.page_elems(MODEL) == 2 * CONFIG.page_tokens * 3 * 32


def test_attention_that_needs_plans_of_its_own_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 1 has .* \(6, 3, 32\) and layer 0"):
        AttentionPlanner(MODEL, torch.float32)
