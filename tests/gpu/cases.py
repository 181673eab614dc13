"""What the tests on a GPU share: adapters, requests, the comparison with the truth."""

import random
from collections.abc import Sequence
from typing import Any

from slora_core.engine.engine import Engine
from slora_core.requests import Request, SamplingParams
from tests.factories import ALL_MODULES, ATTENTION_MODULES
from tests.oracle import GreedyOracle, assert_same_greedy

MAX_TOKENS = 20
ADAPTERS: dict[str, dict[str, Any]] = {
    "rank4-qv": {"rank": 4},
    "rank16-all": {"rank": 16, "target_modules": ALL_MODULES, "scale": 0.08},
    "rank33-attention": {"rank": 33, "target_modules": ATTENTION_MODULES},
    # Above the rank up to which graphs are captured at start.
    "rank100-all": {"rank": 100, "target_modules": ALL_MODULES, "scale": 0.05},
}
KINDS = (None, *ADAPTERS)
# Those whose graphs are captured at start.
SMALL_KINDS = KINDS[:-1]


def make_entries(
    num: int, seed: int = 0, kinds: Sequence[str | None] = KINDS, **params: Any
) -> list[Request]:
    """Requests of random prompts, greedy unless `params` say otherwise, dealt out to `kinds`."""
    rng = random.Random(seed)
    sampling = SamplingParams(
        **{"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True, **params}
    )
    return [
        Request(rng.choices(range(3, 256), k=rng.randint(1, 90)), sampling, kinds[i % len(kinds)])
        for i in range(num)
    ]


def check(oracle: GreedyOracle, engine: Engine, entries: list[Request]) -> None:
    """Generate, and compare each text with transformers and PEFT on the CPU."""
    for entry, text in zip(entries, engine.generate(entries), strict=True):
        expected = oracle.generate(entry.prompt_ids, entry.sampling.max_tokens, entry.adapter_id)
        assert_same_greedy(oracle, entry.prompt_ids, text, expected, entry.adapter_id)
    engine.check_integrity()
