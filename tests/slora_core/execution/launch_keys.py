"""Finds kernels that requests launch and the warm-up did not; a program of its own, without a GPU.

Nothing is computed: what counts is under which keys Triton looks for compiled kernels. Linears
return zeros: in bf16 they take minutes on some processors.
"""

import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from triton import knobs

from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.execution.warm_up import run_every_kernel
from slora_core.models.registry import load_model_config
from slora_core.models.weights import dummy_weights
from slora_core.requests import Request, SamplingParams
from tests.absent_gpu import pretend_gpu
from tests.factories import ALL_MODULES, make_model, make_random_adapter

SHAPE = {
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    # Wide enough to be cut into parts.
    "hidden_size": 1152,
    "head_dim": 128,
    "intermediate_size": 1300,
    "max_position_embeddings": 512,
}
RANKS = (4, 16, 20, 64)
# Tokens a step, and of the pool: steps longer than a context, and pools smaller than steps.
SETTINGS = ((512, 8192), (2048, 16384), (4096, 3000))


def _make_engine(directory: Path, budget: int, pool_tokens: int) -> Engine:
    from kernels import triton_ops

    model_dir = make_model(directory / "model", "llama", **SHAPE)
    model = load_model_config(model_dir)
    config = EngineConfig(
        device="cpu",
        dtype="bfloat16",
        num_pool_tokens=pool_tokens,
        max_batched_tokens=budget,
        max_running_requests=64,
        # Garbage has no prefix.
        prefix_caching=False,
    )
    engine = Engine(model, config, dummy_weights(model, "cpu", torch.bfloat16), triton_ops)
    for rank in RANKS:
        path = make_random_adapter(
            directory / str(rank), model_dir, rank=rank, target_modules=ALL_MODULES
        )
        packed = load_packed_adapter(path, engine.geometry)
        engine.add_adapter(replace(packed, adapter_id=str(rank)))
    return engine


def _serve(engine: Engine, rng: random.Random) -> None:
    """Requests of all lengths, one at a time and many at once."""
    short, any_length = (1, 3, 7), (1, 3, 20, 100, 400)
    for num, lengths in (
        *[(1, any_length)] * 3,
        (2, any_length),
        (5, any_length),
        (40, any_length),
        (64, any_length),
        (64, short),
    ):
        for _ in range(num):
            prompt = [3] * rng.choice(lengths)
            params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
            adapter_id = rng.choice((None, *map(str, RANKS)))
            engine.add_request(Request(prompt, params, adapter_id))
        while engine.has_work:
            engine.step()


def _zeros(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """For `F.linear`."""
    return x.new_zeros(*x.shape[:-1], weight.shape[0])


def main() -> None:
    """Write "warm" or "missing" for each kernel: launched by the warm-up, or by requests first."""
    pretend_gpu()
    F.linear = _zeros
    keys: set[tuple[str, str]] = set()
    word = ""

    def record(*, key: str, fn: Any, **_: Any) -> bool:
        if (fn.name, key) not in keys:
            keys.add((fn.name, key))
            sys.stdout.write(f"{word}:{fn.name}\n")
        return True

    knobs.runtime.jit_cache_hook = record
    for budget, pool_tokens in SETTINGS:
        with tempfile.TemporaryDirectory() as directory:
            engine = _make_engine(Path(directory), budget, pool_tokens)
        keys.clear()
        word = "warm"
        run_every_kernel(engine.model, engine.config, engine.builder, engine.runner)
        word = "missing"
        _serve(engine, random.Random(budget))


if __name__ == "__main__":
    main()
