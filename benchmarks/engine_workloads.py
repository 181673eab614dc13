"""Shapes, adapters and requests of the offline engine benchmark, as S-LoRA's paper sets them.

Adapters are random and already packed: no files are read. Knows the engine's types, not its parts.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from slora_core.adapters.page_layout import AdapterGeometry, PackedAdapter, plan_layout
from slora_core.config import LORA_MODULES, ModelConfig, SamplingParams
from slora_core.engine import GenerationRequest

SHAPES = {
    "llama-7b": ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    ),
    "llama-3.1-8b": ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
    ),
    # For trying the benchmark itself out.
    "tiny": ModelConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
    ),
}

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

# Standard deviation of random adapter weights.
ADAPTER_STD = 0.02


@dataclass(frozen=True)
class AdapterSetting:
    """Ranks by adapter index modulo their number, on these modules."""

    ranks: tuple[int, ...]
    modules: tuple[str, ...]


# S1 and S2 are S-LoRA's (Sheng et al., 2023, table 1).
SETTINGS = {
    "S1": AdapterSetting((8,), _ATTENTION),
    "S2": AdapterSetting((64, 32, 16, 8), _ATTENTION),
    "all16": AdapterSetting((16,), LORA_MODULES),
    "rank64": AdapterSetting((64,), _ATTENTION),
}


def adapter_name(index: int) -> str:
    return f"adapter-{index}"


class DummyAdapters:
    """Random packed adapters in host memory; many adapters alias a few distinct host copies.

    On the device every adapter has pages of its own, so nothing gets faster by the aliasing.
    """

    def __init__(
        self,
        geometry: AdapterGeometry,
        setting: AdapterSetting,
        device: torch.device,
        num_distinct: int = 64,
        seed: int = 0,
    ) -> None:
        self._geometry = geometry
        self._setting = setting
        generator = torch.Generator(device).manual_seed(seed)
        self._copies = [self._make(index, generator) for index in range(num_distinct)]

    def __getitem__(self, index: int) -> PackedAdapter:
        """Adapter `index`; its ranks are those of its index, whatever copy it aliases."""
        copy = self._copies[index % len(self._copies)]
        return replace(copy, adapter_id=adapter_name(index))

    def _make(self, index: int, generator: torch.Generator) -> PackedAdapter:
        geometry, ranks = self._geometry, self._setting.ranks
        rank = ranks[index % len(ranks)]
        modules = [LORA_MODULES.index(name) for name in self._setting.modules]
        keys = [(layer, module) for layer in range(geometry.num_layers) for module in modules]
        layout = plan_layout(geometry, dict.fromkeys(keys, rank), dict.fromkeys(keys, 1.0))
        shape = (layout.num_pages, geometry.num_layers, geometry.page_elems)
        pages = torch.empty(shape, dtype=geometry.dtype, device=generator.device)
        pages.normal_(0.0, ADAPTER_STD, generator=generator)
        host = torch.empty(shape, dtype=geometry.dtype, pin_memory=generator.device.type == "cuda")
        host.copy_(pages)
        return PackedAdapter(adapter_name(index), layout, host)


def _request(
    prompt_len: int, output_len: int, adapter: int | None, vocab_size: int, rng: random.Random
) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=rng.choices(range(vocab_size), k=prompt_len),
        params=SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True),
        adapter_id=None if adapter is None else adapter_name(adapter),
    )


def fixed_batch(
    adapters: Sequence[int | None], prompt_len: int, output_len: int, vocab_size: int, seed: int
) -> list[GenerationRequest]:
    """One request an entry of `adapters`, all of the same lengths."""
    rng = random.Random(seed)
    return [_request(prompt_len, output_len, a, vocab_size, rng) for a in adapters]


def trace(
    adapters: Sequence[int | None],
    vocab_size: int,
    seed: int,
    shortest: int = 8,
    longest: int = 512,
) -> list[GenerationRequest]:
    """One request an entry of `adapters`; lengths in and out uniform in [shortest, longest]."""
    rng = random.Random(seed)
    return [
        _request(rng.randint(shortest, longest), rng.randint(shortest, longest), a, vocab_size, rng)
        for a in adapters
    ]
