"""Seeded open-loop workloads: when a request is due, which adapter it asks, how long it is.

Arrivals, popularity and lengths are those of S-LoRA (Sheng et al., 2023, section 7.1 and its
published benchmark). It knows no server and no adapter names: adapters are numbers here.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.popularity import PATTERNS, draw_adapters

# S-LoRA's power law beside the patterns that tests share.
POWER = "power"
POPULARITIES = (POWER, *PATTERNS)

# Ids below are special tokens in every tokenizer that the settings use.
FIRST_PROMPT_ID = 256


@dataclass(frozen=True)
class TraceConfig:
    """A workload; the same one always gives the same trace.

    Raises:
        ValueError: a value outside its range.
    """

    # Adapters in [0, num_adapters) are asked; 0: the base model only.
    num_adapters: int
    # Mean arrivals a second.
    rate: float
    # Arrivals are spread over this time; rate x duration_s of them.
    duration_s: float
    # Prompt and output tokens, uniform, both ends included.
    input_range: tuple[int, int]
    output_range: tuple[int, int]
    vocab_size: int
    # Coefficient of variation of the gaps between arrivals; 1 is a Poisson process.
    cv: float = 1.0
    popularity: str = POWER
    # All are due at the start, whatever the rate.
    at_once: bool = False
    # Of the power law only: S-LoRA's, 1 is uniform and less asks the first adapters more.
    alpha: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("num_adapters", self.num_adapters >= 0, "0 (the base model only) or more"),
            ("rate", self.rate > 0, "above 0"),
            ("duration_s", self.duration_s > 0, "above 0"),
            ("cv", self.cv > 0, "above 0"),
            ("alpha", self.alpha > 0, "above 0"),
            ("popularity", self.popularity in POPULARITIES, "one of " + ", ".join(POPULARITIES)),
            ("input_range", _is_range(self.input_range), "two lengths, 1 <= first <= second"),
            ("output_range", _is_range(self.output_range), "two lengths, 1 <= first <= second"),
            ("vocab_size", self.vocab_size > FIRST_PROMPT_ID, f"above {FIRST_PROMPT_ID}"),
        )
        for name, ok, allowed in checks:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")

    @property
    def num_requests(self) -> int:
        return max(1, round(self.rate * self.duration_s))


@dataclass(frozen=True)
class TraceRequest:
    """One request; `adapter` None is the base model."""

    # Seconds after the start of the trace.
    due_s: float
    adapter: int | None
    prompt_ids: tuple[int, ...]
    output_len: int


def make_trace(config: TraceConfig) -> list[TraceRequest]:
    """The requests of a workload in order of arrival.

    Every quantity has random numbers of its own, so that traces which differ in the number of
    adapters, say, have the same arrivals, prompts and lengths.
    """
    num_requests = config.num_requests
    adapters = _adapters(config)
    lengths = _stream(config, "lengths")
    tokens = _stream(config, "tokens")
    requests = []
    for due_s, adapter in zip(_arrivals(config), adapters, strict=True):
        input_len = lengths.randint(*config.input_range)
        prompt = tuple(tokens.choices(range(FIRST_PROMPT_ID, config.vocab_size), k=input_len))
        requests.append(TraceRequest(due_s, adapter, prompt, lengths.randint(*config.output_range)))
    assert len(requests) == num_requests
    return requests


def power_law_adapters(
    alpha: float, num_requests: int, num_adapters: int, rng: random.Random
) -> list[int]:
    """Adapter of each request: floor(num_adapters * x), x in [0, 1) with density alpha x^(alpha-1).

    S-LoRA's power law: adapters below a share s of all get the share s^alpha of the requests, so
    alpha 1 is uniform, 0.1 sends 79% to the first tenth, and above 1 the last are the popular ones.
    """
    return [
        # The power can round up to 1.
        min(int(rng.random() ** (1 / alpha) * num_adapters), num_adapters - 1)
        for _ in range(num_requests)
    ]


def _arrivals(config: TraceConfig) -> list[float]:
    """Sums of gamma-distributed gaps with mean 1 / rate and the coefficient of variation cv."""
    if config.at_once:
        return [0.0] * config.num_requests
    rng = _stream(config, "arrivals")
    shape, scale = config.cv**-2, config.cv**2 / config.rate
    times, now = [], 0.0
    for _ in range(config.num_requests):
        now += rng.gammavariate(shape, scale)
        times.append(now)
    return times


def _adapters(config: TraceConfig) -> Sequence[int | None]:
    num_requests, num_adapters = config.num_requests, config.num_adapters
    if num_adapters == 0:
        return [None] * num_requests
    if config.popularity == POWER:
        rng = _stream(config, "adapters")
        return power_law_adapters(config.alpha, num_requests, num_adapters, rng)
    return draw_adapters(config.popularity, num_requests, num_adapters, config.seed)


def _stream(config: TraceConfig, name: str) -> random.Random:
    # Seeded by a string: the same on every machine and Python version.
    return random.Random(f"{config.seed}/{name}")


def _is_range(lengths: tuple[int, int]) -> bool:
    return len(lengths) == 2 and 1 <= lengths[0] <= lengths[1]
