"""Popularity patterns: which request uses which adapter, shared by tests and benchmarks.

The patterns are those of Punica (Chen et al., 2023) and S-LoRA (Sheng et al., 2023): from all
requests on one adapter to each on its own, with power laws between.
"""

import random
from collections.abc import Sequence

PATTERNS = ("identical", "distinct", "uniform", "zipf", "skewed")

# Adapter i is drawn with weight 1 / (i + 1) ** exponent.
_EXPONENTS = {"uniform": 0.0, "zipf": 1.0, "skewed": 1.5}


def draw_adapters(pattern: str, num_requests: int, num_adapters: int, seed: int = 0) -> list[int]:
    """Adapter index in [0, num_adapters) of each request, a function of its arguments only.

    identical: all use adapter 0; distinct: request i uses i modulo num_adapters; uniform, zipf,
    skewed: independent draws with a power law of exponent 0, 1, 1.5.
    """
    if pattern == "identical":
        return [0] * num_requests
    if pattern == "distinct":
        return [i % num_adapters for i in range(num_requests)]
    return random.Random(seed).choices(
        range(num_adapters), weights(pattern, num_adapters), k=num_requests
    )


def weights(pattern: str, num_adapters: int) -> Sequence[float]:
    """Relative frequency of each adapter under one of the random patterns."""
    exponent = _EXPONENTS[pattern]
    return [(index + 1) ** -exponent for index in range(num_adapters)]
