"""The engine alone, without a server: decode steps, prefill, traces and latencies, dummy weights.

    python -m benchmarks.bench_engine --shape llama-7b --setting S1 --check decode prefill trace

One engine is built for all measurements of a run; each prints one JSON row. `--check` first
compares logits with transformers on the same random weights and refuses to go on where they
differ.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import engine_figures as figures
from benchmarks.dummy_adapters import DummyAdapters
from benchmarks.engine_check import check_logits
from benchmarks.engine_driver import EngineDriver
from benchmarks.engine_figures import SEED, Figures
from benchmarks.engine_workloads import SETTINGS, SHAPES, STANDARD, WIDE
from benchmarks.report import add_output_option, make_row, publish
from slora_core.config import EngineConfig
from slora_core.engine import Engine
from slora_core.models.weights import dummy_weights

# Of the measured throughput, what arrives in `online` where no rate is given.
ONLINE_SHARE = 0.7
# Adapters of rank 64 alias this few host copies: one of a 7B model is 134 MB.
NUM_WIDE_COPIES = 4


def decode(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    for batch in args.batches:
        for n in dict.fromkeys((0, 1, batch)):
            row = figures.decode(driver, batch, n, args.prompt_len, args.decode_steps)
            yield {"batch": batch, "num_adapters": n, **row}


def sync_free(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    for n in (0, args.streams):
        row = figures.sync_free(driver, args.streams, n, args.prompt_len, 50)
        yield {"batch": args.streams, "num_adapters": n, **row}


def prefill(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    for n in (0, 1, args.streams):
        row = figures.prefill(driver, args.streams, n, args.prompt_len)
        yield {"batch": args.streams, "num_adapters": n, **row}


def mixed(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    chunk = args.prompt_len // 2
    row = figures.mixed(driver, args.streams, chunk, args.prompt_len)
    yield {"batch": args.streams, "chunk": chunk, **row}


def trace(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    for n in args.num_adapters:
        row = figures.at_once(driver, figures.zipf(args.num_requests, n), args.lengths)
        yield {"num_adapters": n, **row}


def spread(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    for n in (0, args.num_spread):
        row = figures.at_once(driver, figures.spread(args.num_spread, n), args.lengths)
        yield {"num_adapters": n, **row}


def online(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    n = max(args.num_adapters)
    adapters = figures.zipf(args.num_requests, n)
    rate = args.rate
    if rate is None:
        measured = figures.at_once(driver, adapters, args.lengths)["requests_per_s"]
        rate = ONLINE_SHARE * measured
    row = figures.online(driver, adapters, args.lengths, rate)
    yield {"num_adapters": n, **row}


def cold(driver: EngineDriver, args: argparse.Namespace) -> Iterator[Figures]:
    # None of the adapters of other workloads.
    first = 1 + max(args.num_spread, *args.num_adapters)
    yield {"where": "idle", **figures.cold_when_idle(driver, args.num_cold, first)}
    for kind in ("none", "resident", "cold", "none"):
        row = figures.loads_beside(
            driver, args.streams, args.load_tokens, args.prompt_len, args.load_rate, kind
        )
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
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("workloads", nargs="+", choices=list(WORKLOADS))
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-7b")
    parser.add_argument("--setting", choices=list(SETTINGS), default="S1")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--profile", type=Path, help="file for the kernels of some decode steps")
    parser.add_argument("--check", action="store_true", help="logits against transformers first")
    add_output_option(parser)

    engine = parser.add_argument_group("the engine")
    engine.add_argument("--max-running-requests", type=int, default=256)
    engine.add_argument("--max-batched-tokens", type=int, default=8192)
    engine.add_argument("--num-pool-tokens", type=int, help="default: what the memory leaves")
    engine.add_argument(
        "--admission-output-tokens", type=int, help="output assumed of a request; its own if not"
    )

    sizes = parser.add_argument_group("sizes of workloads, tokens and requests")
    sizes.add_argument("--batches", type=int, nargs="+", default=[1, 32, 64, 128], help="decode")
    sizes.add_argument("--streams", type=int, default=64, help="at once, where not of --batches")
    sizes.add_argument("--prompt-len", type=int, default=512)
    sizes.add_argument("--decode-steps", type=int, default=128)
    sizes.add_argument("--num-requests", type=int, default=512, help="of trace and online")
    sizes.add_argument(
        "--lengths",
        type=int,
        nargs=2,
        default=[8, 512],
        help="in and out, of the same and spread",
    )
    sizes.add_argument(
        "--num-adapters",
        type=int,
        nargs="+",
        default=[0, 5, 1000, 2000],
        help="of trace in turn, 0 for the base model; the most, of online",
    )
    sizes.add_argument("--num-spread", type=int, default=2000, help="requests, each its adapter")
    sizes.add_argument("--rate", type=float, help="of online; default: 70%% of its throughput")
    sizes.add_argument("--num-cold", type=int, default=20, help="adapters loaded when idle")
    sizes.add_argument("--load-tokens", type=int, default=512, help="of streams beside loads")
    sizes.add_argument("--load-rate", type=float, default=20.0, help="adapters loaded a second")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu tries the benchmark out")
    if args.device == "cpu" and "sync-free" in args.workloads:
        parser.error("sync-free is about CUDA")
    if "prefix" in args.workloads and len(args.workloads) > 1:
        parser.error("prefix runs alone: the others run without a prefix cache")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.device == "cuda":
        # As an engine process has it.
        torch.set_num_threads(1)
    started = time.perf_counter()
    model, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
    weights = dummy_weights(model, args.device, dtype)
    if args.check:
        check_logits(model, weights, args.device)
    weights_s = time.perf_counter() - started
    config = EngineConfig(
        device=args.device,
        dtype=dtype,
        num_pool_tokens=args.num_pool_tokens or (16384 if args.device == "cpu" else None),
        max_batched_tokens=args.max_batched_tokens,
        max_running_requests=args.max_running_requests,
        max_inflight_steps=1 if args.device == "cpu" else 2,
        admission_output_tokens=args.admission_output_tokens,
        prefix_caching="prefix" in args.workloads,
    )
    engine = Engine(model, config, weights)
    startup_s = {"weights": weights_s, **engine.startup_s}
    settings = {
        "shape": args.shape,
        "setting": args.setting,
        "num_pages": engine.stats().num_pages,
        "startup_s": {stage: round(seconds, 1) for stage, seconds in startup_s.items()},
        "ready_s": round(sum(startup_s.values()), 1),
        **{k: str(v) for k, v in dataclasses.asdict(config).items()},
    }
    print(
        f"ready in {settings['ready_s']} s, {settings['startup_s']}, {settings['num_pages']} pages",
        file=sys.stderr,
    )
    driver = EngineDriver(engine, _families(args, engine))
    if args.profile is not None:
        for batch, num_adapters in ((1, 1), (64, 0), (64, 1), (64, 64)):
            figures.profile(driver, batch, num_adapters, args.profile)
    for name in args.workloads:
        for row in WORKLOADS[name](driver, args):
            publish(make_row("engine", {"workload": name, **row}, settings, SEED), args.output)


def _families(args: argparse.Namespace, engine: Engine) -> dict[str, DummyAdapters]:
    device = torch.device(args.device)
    standard = DummyAdapters(STANDARD, engine.geometry, SETTINGS[args.setting], device)
    families = {STANDARD: standard}
    if "cold" in args.workloads:
        for name in (WIDE, f"{WIDE}-kept"):
            families[name] = DummyAdapters(
                name, engine.geometry, SETTINGS["rank64"], device, NUM_WIDE_COPIES
            )
    return families


if __name__ == "__main__":
    main()
