"""What the offline engine benchmark measures: one function a workload, figures of one row each.

They know an `EngineDriver` and the workloads' requests; `bench_engine` chooses their sizes.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from benchmarks.engine.driver import EngineDriver, Timing
from benchmarks.engine.workloads import (
    WIDE,
    WIDE_KEPT,
    adapter_id,
    fixed_batch,
    poisson_arrivals,
    shared_prefix,
    trace,
)
from benchmarks.serving.load_summary import percentile
from tests.popularity import draw_adapters

Figures = dict[str, Any]
SEED = 0


def round_robin(num_requests: int, num_adapters: int) -> list[str | None]:
    """Adapter of each request, in turn; 0 adapters: the base model."""
    return [adapter_id(i % num_adapters) if num_adapters else None for i in range(num_requests)]


def zipf(num_requests: int, num_adapters: int) -> list[str | None]:
    """Adapter of each request, by a power law of exponent 1; 0 adapters: the base model."""
    if not num_adapters:
        return [None] * num_requests
    return [adapter_id(i) for i in draw_adapters("zipf", num_requests, num_adapters, SEED)]


def decode(
    driver: EngineDriver, batch: int, num_adapters: int, prompt_len: int, num_steps: int
) -> Figures:
    """ms of a decode step of `batch` requests, after one warm run, while all of them run."""
    adapters = round_robin(batch, num_adapters)
    requests = fixed_batch(adapters, prompt_len, num_steps, driver.vocab_size, SEED)
    driver.run(requests)
    live = driver.add(requests)
    driver.prefill(live)
    driver.settle()
    started, steps = time.perf_counter(), 0
    # The first in the queue is ahead of the others; its last two steps may be in flight.
    while not steps or len(live[0].output_ids) < num_steps - 2:
        driver.engine.step()
        steps += 1
    driver.settle()
    seconds = time.perf_counter() - started
    driver.finish()
    return {"decode_step_ms": 1e3 * seconds / steps, "num_steps": steps}


def prefill(driver: EngineDriver, batch: int, num_adapters: int, prompt_len: int) -> Figures:
    """ms until `batch` prompts are computed and each has its first token; the best of two."""
    adapters = round_robin(batch, num_adapters)
    requests = fixed_batch(adapters, prompt_len, 1, driver.vocab_size, SEED)
    driver.run(requests)
    best = min(driver.run(requests) for _ in range(2))
    return {"prefill_ms": 1e3 * best, "tokens_per_s": batch * prompt_len / best}


def mixed(driver: EngineDriver, batch: int, chunk: int, prompt_len: int) -> Figures:
    """ms of a step of `batch` decodes and a prompt of `chunk` tokens, one after another."""
    num_steps = 32
    requests = fixed_batch([None] * batch, prompt_len, 2 * num_steps, driver.vocab_size, SEED)
    prompts = fixed_batch([None] * num_steps, chunk, 1, driver.vocab_size, SEED + 1)
    driver.prefill(driver.add(requests))
    started = 0.0
    for index, prompt in enumerate(prompts):
        if index == num_steps // 2:
            driver.settle()
            started = time.perf_counter()
        driver.add([prompt])
        driver.engine.step()
    driver.settle()
    seconds = time.perf_counter() - started
    driver.finish()
    return {"mixed_step_ms": 1e3 * seconds / (num_steps - num_steps // 2)}


def at_once(
    driver: EngineDriver, adapters: Sequence[str | None], lengths: tuple[int, int]
) -> Figures:
    """All requests at once, one an adapter: throughput, and what the pool went through.

    No adapter is in the pool at the start, whatever was measured before.
    """
    requests = trace(adapters, lengths, driver.vocab_size, SEED)
    driver.forget_adapters()
    before = asdict(driver.engine.stats())
    seconds = driver.run(requests)
    after = asdict(driver.engine.stats())
    counters = ("num_steps", "num_preemptions")
    counters += ("num_adapter_loads", "num_adapter_hits", "num_adapter_evictions")
    return {
        "num_requests": len(requests),
        "requests_per_s": len(requests) / seconds,
        "output_tokens_per_s": sum(r.sampling.max_tokens for r in requests) / seconds,
        "seconds": seconds,
        **{name: after[name] - before[name] for name in counters},
    }


def spread(num_requests: int, num_adapters: int) -> list[str | None]:
    """Adapters in random order, each as often as the others; 0 adapters: the base model."""
    adapters = round_robin(num_requests, num_adapters)
    random.Random(SEED).shuffle(adapters)
    return adapters


def online(
    driver: EngineDriver, adapters: Sequence[str | None], lengths: tuple[int, int], rate: float
) -> Figures:
    """Poisson arrivals at `rate` a second, whatever is still open, one an adapter."""
    requests = trace(adapters, lengths, driver.vocab_size, SEED)
    timings = driver.run_open_loop(requests, poisson_arrivals(len(requests), rate, SEED))
    return {"rate": rate, "num_requests": len(requests), **_latency(timings)}


def cold_when_idle(driver: EngineDriver, num_adapters: int, first_adapter: int) -> Figures:
    """Time to first token of adapters in the pool and of ones in host memory, one at a time."""

    def ttft_ms(adapter: str) -> float:
        return 1e3 * driver.run(fixed_batch([adapter], 64, 1, driver.vocab_size, SEED))

    # Once each to warm up. In turn, so that what drifts meanwhile is in both alike.
    for _ in range(2):
        ttft_ms(adapter_id(first_adapter - 1))
    cold, resident = [], []
    for i in range(first_adapter, first_adapter + num_adapters):
        cold.append(ttft_ms(adapter_id(i)))
        resident.append(ttft_ms(adapter_id(i)))
    return {
        "cold_ttft_ms": statistics.median(cold),
        "resident_ttft_ms": statistics.median(resident),
        "added_ms": statistics.median(cold) - statistics.median(resident),
    }


def loads_beside(
    driver: EngineDriver, batch: int, num_tokens: int, prompt_len: int, rate: float, kind: str
) -> Figures:
    """Inter-token time of `batch` streams, once all decode, beside requests of rank-64 adapters.

    Args:
        kind: "none" of them, "resident" ones, or "cold" ones, each of which is loaded.
    """
    streams = fixed_batch(
        round_robin(batch, batch), prompt_len, num_tokens, driver.vocab_size, SEED
    )
    # As long as the streams last at 15 ms a step.
    num_short = 0 if kind == "none" else max(1, int(rate * num_tokens * 0.015))
    if kind == "cold":
        names = [adapter_id(i, WIDE) for i in range(num_short)]
    else:
        names = [adapter_id(i % 8, WIDE_KEPT) for i in range(num_short)]
    short = fixed_batch(names, 64, 1, driver.vocab_size, SEED + 1)
    if kind == "resident":
        driver.run(short[:8])
    loads = driver.engine.stats().num_adapter_loads
    # The streams are prefilled by the time that the first short request comes.
    arrivals = [1.0 + i / rate for i in range(num_short)]
    timings = driver.run_open_loop([*streams, *short], [*[0.0] * batch, *arrivals])
    long, brief = timings[:batch], timings[batch:]
    # Not while other streams were still prefilled, which takes long and is the same for all kinds.
    figures = _latency(long, since_s=max(timing.token_s[0] for timing in long))
    if brief:
        steps = [t.first_token_step - t.arrival_step for t in brief]
        figures |= {
            "short_ttft_p50_ms": 1e3 * statistics.median(t.ttft_s for t in brief),
            "short_steps_p50": statistics.median(steps),
            "short_steps_max": max(steps),
        }
    return {
        "kind": kind,
        "num_adapter_loads": driver.engine.stats().num_adapter_loads - loads,
        **figures,
    }


def prefixes(
    driver: EngineDriver, batch: int, prefix_len: int, *, shared: bool, seed: int
) -> Figures:
    """ms until `batch` requests that share a prefix, or share none, have their first tokens."""
    requests = shared_prefix(
        batch, prefix_len, 20, 1, adapter_id(0), driver.vocab_size, seed, shared=shared
    )
    before = driver.engine.stats()
    seconds = driver.run(requests)
    after = driver.engine.stats()
    prompts = after.num_prompt_tokens - before.num_prompt_tokens
    cached = after.num_cached_prompt_tokens - before.num_cached_prompt_tokens
    return {
        "prefill_ms": 1e3 * seconds,
        "num_prompt_tokens": prompts,
        "num_computed_tokens": prompts - cached,
    }


def _latency(timings: Sequence[Timing], since_s: float = 0.0) -> Figures:
    """Percentiles; of the time between tokens, only where the first came at `since_s` or later."""
    ttfts = [timing.ttft_s for timing in timings]
    gaps = [
        right - left
        for timing in timings
        for left, right in pairwise(timing.token_s)
        if left >= since_s
    ]
    figures: Figures = {}
    for name, values in (("ttft", ttfts), ("inter_token", gaps)):
        for percent in (50, 99):
            value = percentile(values, percent)
            figures[f"{name}_p{percent}_ms"] = None if value is None else 1e3 * value
    return figures
