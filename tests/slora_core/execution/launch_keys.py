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
RANKS = (4, 16, 20, 64, 129)
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
    kinds = None, *map(str, RANKS)
    for num, lengths, adapter_ids in (
        # Steps without LoRA.
        (1, any_length, (None,)),
        (5, any_length, (None,)),
        *[(1, any_length, kinds)] * 3,
        (2, any_length, kinds),
        (5, any_length, kinds),
        (40, any_length, kinds),
        (64, any_length, kinds),
        (64, short, kinds),
    ):
        for _ in range(num):
            prompt = [3] * rng.choice(lengths)
            params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
            engine.add_request(Request(prompt, params, rng.choice(adapter_ids)))
        while engine.has_work:
            engine.step()


def _zeros(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """For `F.linear`."""
    return x.new_zeros(*x.shape[:-1], weight.shape[0])


def _launches(directory: Path, budget: int, pool_tokens: int) -> set[str]:
    """Who launches each kernel: "warm-up:_norm_kernel", "requests:_norm_kernel".

    "requests-first" are launches that the warm-up did not have.
    """
    engine = _make_engine(directory, budget, pool_tokens)
    keys: set[tuple[str, str]] = set()
    launches: set[str] = set()
    is_warm = False

    def record(*, key: str, fn: Any, **_: Any) -> bool:
        if not is_warm:
            keys.add((fn.name, key))
            who = "warm-up"
        else:
            who = "requests" if (fn.name, key) in keys else "requests-first"
        launches.add(f"{who}:{fn.name}")
        return True

    knobs.runtime.jit_cache_hook = record
    run_every_kernel(engine.model, engine.config, engine.builder, engine.runner)
    is_warm = True
    _serve(engine, random.Random(budget))
    return launches


def main() -> None:
    """Write the launches of each engine, with its number before them."""
    pretend_gpu()
    F.linear = _zeros
    for number, (budget, pool_tokens) in enumerate(SETTINGS):
        with tempfile.TemporaryDirectory() as directory:
            for launch in sorted(_launches(Path(directory), budget, pool_tokens)):
                sys.stdout.write(f"{number}:{launch}\n")


if __name__ == "__main__":
    main()
