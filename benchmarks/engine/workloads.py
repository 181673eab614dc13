"""Shapes, adapter settings and requests of the offline engine benchmark, as S-LoRA sets them.

All is a function of its arguments. Knows the engine's types, not its parts.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from benchmarks.lora_targets import ATTENTION, MLP
from slora_core.models.registry import parse_model_config
from slora_core.requests import Request, SamplingParams

# Fields of Hugging Face configs.
_LLAMA_SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    # The demo model's, which a CPU can run.
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    # For trying the benchmark itself out.
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
}
SHAPES = {
    name: parse_model_config({"model_type": "llama", **fields}, {})
    for name, fields in _LLAMA_SHAPES.items()
}


@dataclass(frozen=True)
class AdapterSetting:
    """Ranks by adapter index modulo their number, on these modules."""

    ranks: tuple[int, ...]
    modules: tuple[str, ...]


# S1 and S2 are S-LoRA's (Sheng et al., 2023, table 1).
SETTINGS = {
    "S1": AdapterSetting((8,), ATTENTION),
    "S2": AdapterSetting((64, 32, 16, 8), ATTENTION),
    "all16": AdapterSetting((16,), ATTENTION + MLP),
    "rank64": AdapterSetting((64,), ATTENTION),
}


# Names of adapters end in their number.
STANDARD = "adapter"
# Of rank 64, that come and go beside the others, and that stay.
WIDE, WIDE_KEPT = "wide", "wide-kept"


def adapter_id(index: int, family: str = STANDARD) -> str:
    return f"{family}-{index}"


def fixed_batch(
    adapters: Sequence[str | None], prompt_len: int, output_len: int, vocab_size: int, seed: int
) -> list[Request]:
    """One request an entry of `adapters`, all of the same lengths."""
    rng = random.Random(seed)
    return [
        _request(index, prompt_len, output_len, adapter, vocab_size, rng)
        for index, adapter in enumerate(adapters)
    ]


def trace(
    adapters: Sequence[str | None], lengths: tuple[int, int], vocab_size: int, seed: int
) -> list[Request]:
    """One request an entry of `adapters`; lengths in and out uniform, both ends included."""
    rng = random.Random(seed)
    return [
        _request(index, rng.randint(*lengths), rng.randint(*lengths), adapter, vocab_size, rng)
        for index, adapter in enumerate(adapters)
    ]


def shared_prefix(
    num_requests: int,
    prefix_len: int,
    tail_len: int,
    output_len: int,
    adapter: str,
    vocab_size: int,
    seed: int,
    *,
    shared: bool = True,
) -> list[Request]:
    """Requests that differ in their last tokens alone, or, not `shared`, in all."""
    rng = random.Random(f"prefix {seed}")
    requests = fixed_batch(
        [adapter] * num_requests, prefix_len + tail_len, output_len, vocab_size, seed
    )
    if not shared:
        return requests
    prefix = rng.choices(range(vocab_size), k=prefix_len)
    return [replace(r, prompt_ids=[*prefix, *r.prompt_ids[prefix_len:]]) for r in requests]


def poisson_arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start at which requests arrive, `rate` a second."""
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(rate) for _ in range(num_requests)))


def _request(
    index: int,
    prompt_len: int,
    output_len: int,
    adapter: str | None,
    vocab_size: int,
    rng: random.Random,
) -> Request:
    return Request(
        rng.choices(range(vocab_size), k=prompt_len),
        SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True),
        adapter,
        # Of its list alone, not of all: a random one would be no function of the arguments.
        request_id=str(index),
    )
