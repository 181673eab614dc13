"""The engine itself, as `bench_engine` measures it: one engine, dummy adapters, all workloads."""

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.engine import figures
from benchmarks.engine import profile as engine_profile
from benchmarks.engine.check import check_logits
from benchmarks.engine.driver import EngineDriver
from benchmarks.engine.dummy_adapters import DummyAdapters
from benchmarks.engine.figures import Figures
from benchmarks.engine.long_prompt import behind_long_prompt
from benchmarks.engine.rows import decode_rows, prefill_rows, spread_rows, trace_rows
from benchmarks.engine.workloads import SETTINGS, SHAPES, STANDARD, WIDE, WIDE_KEPT
from slora_core.config import EngineConfig
from slora_core.dtypes import torch_dtype
from slora_core.engine.engine import Engine
from slora_core.models.weights import dummy_weights

# Of the measured throughput, what arrives in `online` where no rate is given.
ONLINE_SHARE = 0.7
# Of the streams beside which adapters are loaded, before anything is measured.
WARM_UP_TOKENS = 128
# Adapters of rank 64 alias this few host copies: one of a 7B model is 134 MB.
NUM_WIDE_COPIES = 4


def decode(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    measure = partial(
        figures.decode, driver, prompt_len=args.prompt_len, num_steps=args.decode_steps
    )
    yield from decode_rows(measure, args)


def sync_free(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    for n in (0, args.streams):
        # The second, with adapters, is the one that stays.
        row = engine_profile.sync_free(
            driver, args.streams, n, args.prompt_len, 50, args.sync_trace
        )
        yield {"batch": args.streams, "num_adapters": n, **row}


def prefill(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    yield from prefill_rows(partial(figures.prefill, driver, prompt_len=args.prompt_len), args)


def mixed(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    chunk = args.prompt_len // 2
    row = figures.mixed(driver, args.streams, chunk, args.prompt_len)
    yield {"batch": args.streams, "chunk": chunk, **row}


def trace(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    yield from trace_rows(
        lambda count, n: figures.at_once(driver, figures.zipf(count, n), args.lengths), args
    )


def spread(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    yield from spread_rows(
        lambda count, n: figures.at_once(driver, figures.spread(count, n), args.lengths), args
    )


def online(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    n = args.num_online_adapters
    adapters = figures.zipf(args.num_requests, n)
    rate = args.rate
    if rate is None:
        measured = figures.at_once(driver, adapters, args.lengths)["requests_per_s"]
        rate = ONLINE_SHARE * measured
    row = figures.online(driver, adapters, args.lengths, rate)
    yield {"num_adapters": n, **row}


def cold(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    # None of the adapters of other workloads.
    first = 1 + max(args.num_spread, args.num_online_adapters, *args.num_adapters)
    yield {"where": "idle", **figures.cold_when_idle(driver, args.num_cold, first)}
    measure = partial(
        figures.loads_beside, driver, args.streams, prompt_len=args.prompt_len, rate=args.load_rate
    )
    # Kernels of steps that also prefill are compiled when they are first used.
    measure(num_tokens=min(args.load_tokens, WARM_UP_TOKENS), kind="resident")
    for kind in ("none", "resident", "cold", "none"):
        row = measure(num_tokens=args.load_tokens, kind=kind)
        yield {"where": "beside streams", "batch": args.streams, **row}


def prefix(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    length = 3 * args.prompt_len - args.prompt_len // 16
    # A first run of each kind warms up; a seed is a prefix.
    for shared, seed, requests in (
        (False, 1, "warm-up"),
        (True, 2, "warm-up"),
        (False, 3, "nothing shared"),
        (True, 4, "a new prefix"),
        (True, 4, "the same again"),
    ):
        row = figures.prefixes(driver, args.streams, length, shared=shared, seed=seed)
        if requests != "warm-up":
            yield {"requests": requests, "batch": args.streams, "prefix_len": length, **row}


def long_prompt(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    yield behind_long_prompt(driver, args.streams, args.prompt_len, args.long_prompt_len)


WORKLOADS: dict[str, Callable[[EngineDriver, argparse.Namespace], Iterator[Figures]]] = {
    "decode": decode,
    "sync-free": sync_free,
    "prefill": prefill,
    "mixed": mixed,
    "trace": trace,
    "spread": spread,
    "online": online,
    "cold": cold,
    "prefix": prefix,
    "long-prompt": long_prompt,
}


class EngineBackend:
    """Builds the engine; `--check` first compares its logits and exits where they differ."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        if args.device == "cuda":
            # As an engine process has it.
            torch.set_num_threads(1)
        started = time.perf_counter()
        model = SHAPES[args.shape]
        weights = dummy_weights(model, args.device, torch_dtype(args.dtype))
        if args.check:
            check_logits(model, weights, args.device)
        weights_s = time.perf_counter() - started
        config = EngineConfig(
            device=args.device,
            dtype=args.dtype,
            num_pool_tokens=args.num_pool_tokens or (16384 if args.device == "cpu" else None),
            max_batched_tokens=args.max_batched_tokens,
            max_running_requests=args.max_running_requests,
            max_inflight_steps=1 if args.device == "cpu" else 2,
            shared_prefill_fraction=args.shared_prefill_fraction,
            admission_output_tokens=args.admission_output_tokens,
            prefix_caching="prefix" in args.workloads,
        )
        engine = Engine(model, config, weights)
        # As an engine process does: what a start, or a check, made stays.
        gc.collect()
        gc.freeze()
        startup_s = {"weights": weights_s, **engine.startup_s}
        self.settings: Figures = {
            "num_pages": engine.stats().num_pages,
            "startup_s": {stage: round(seconds, 1) for stage, seconds in startup_s.items()},
            "ready_s": round(sum(startup_s.values()), 1),
            **{k: str(v) for k, v in dataclasses.asdict(config).items()},
        }
        print(
            f"ready in {self.settings['ready_s']} s, {self.settings['startup_s']}, "
            f"{self.settings['num_pages']} pages",
            file=sys.stderr,
        )
        self._driver = EngineDriver(engine, _families(args, engine))
        if args.profile is not None:
            for batch, num_adapters in ((1, 1), (64, 0), (64, 1), (64, 64)):
                engine_profile.profile(self._driver, batch, num_adapters, args.profile)

    def rows(self, workload: str) -> Iterator[Figures]:
        return WORKLOADS[workload](self._driver, self._args)


def _families(args: argparse.Namespace, engine: Engine) -> dict[str, DummyAdapters]:
    device = torch.device(args.device)
    standard = DummyAdapters(STANDARD, engine.geometry, SETTINGS[args.setting], device)
    families = {STANDARD: standard}
    if "cold" in args.workloads:
        for name in (WIDE, WIDE_KEPT):
            families[name] = DummyAdapters(
                name, engine.geometry, SETTINGS["rank64"], device, NUM_WIDE_COPIES
            )
    return families
