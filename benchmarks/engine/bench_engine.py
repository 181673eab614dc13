"""The engine alone, without a server: decode steps, prefill, traces and latencies, dummy weights.

    python -m benchmarks.engine.bench_engine --setting S1 --check decode prefill trace

One engine is built for all measurements of a run; each prints one JSON row. `--check` first
compares logits with transformers on the same random weights and refuses to go on where they
differ. `--backend` measures a peer instead, where it is installed.
"""

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.engine.backend import WORKLOADS, EngineBackend
from benchmarks.engine.figures import SEED, Figures
from benchmarks.engine.peft_backend import PeftBackend
from benchmarks.engine.vllm_backend import VllmBackend
from benchmarks.engine.workloads import SETTINGS, SHAPES
from benchmarks.report import add_output_option, make_row, publish
from slora_core.config import EngineConfig


class Backend(Protocol):
    """Built from the command's arguments."""

    # What it ran with, of each row.
    settings: Figures

    def rows(self, workload: str) -> Iterator[Figures]: ...


BACKENDS: dict[str, type[Backend]] = {
    "ours": EngineBackend,
    "peft": PeftBackend,
    "vllm": VllmBackend,
}
# Workloads of each peer, whose package has its name.
PEERS = {
    "peft": PeftBackend.WORKLOADS,
    "vllm": VllmBackend.WORKLOADS,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("workloads", nargs="+", choices=list(WORKLOADS))
    parser.add_argument("--backend", choices=list(BACKENDS), default="ours")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-7b")
    parser.add_argument("--setting", choices=list(SETTINGS), default="S1")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--base-only",
        action="store_true",
        help="decode, prefill, trace and spread without adapters; vllm then runs without LoRA",
    )
    add_output_option(parser)
    _add_engine_options(parser)
    _add_sizes(parser)
    args = parser.parse_args(argv)
    problem = _problem(args)
    if problem is not None:
        parser.error(problem)
    return args


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("the engine")
    engine.add_argument("--max-running-requests", type=_count, default=256, help="vllm's too")
    engine.add_argument("--max-batched-tokens", type=_count, default=8192, help="vllm's too")
    engine.add_argument("--max-loras", type=_count, default=64, help="adapter slots, of vllm")
    ours = parser.add_argument_group("of --backend ours")
    ours.add_argument("--profile", type=Path, help="file for the kernels of some decode steps")
    ours.add_argument("--sync-trace", type=Path, help="file.json.gz for the trace of sync-free")
    ours.add_argument("--check", action="store_true", help="logits against transformers first")
    ours.add_argument("--num-pool-tokens", type=_count, help="default: what the memory leaves")
    ours.add_argument(
        "--shared-prefill-fraction",
        type=_fraction,
        default=EngineConfig.shared_prefill_fraction,
        help="of a step's prompt tokens, left to prompts behind the oldest; 0: first come",
    )
    ours.add_argument(
        "--admission-output-tokens", type=_count, help="output assumed of a request; its own if not"
    )


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    sizes = parser.add_argument_group("sizes of workloads, tokens and requests")
    sizes.add_argument("--batches", type=_count, nargs="+", default=[1, 32, 64, 128], help="decode")
    sizes.add_argument("--streams", type=_count, default=64, help="at once, where not of --batches")
    sizes.add_argument("--prompt-len", type=_count, default=512)
    sizes.add_argument("--decode-steps", type=_count, default=128, help="tokens a request, from 2")
    sizes.add_argument("--num-requests", type=_count, default=512, help="of trace and online")
    sizes.add_argument(
        "--lengths",
        type=_count,
        nargs=2,
        default=[8, 512],
        help="in and out, of the same and spread",
    )
    sizes.add_argument(
        "--num-adapters",
        type=int,
        nargs="+",
        default=[0, 5, 1000, 2000],
        help="of trace in turn, 0 for the base model",
    )
    sizes.add_argument("--num-online-adapters", type=_count, default=1000, help="of online")
    sizes.add_argument("--num-spread", type=_count, default=2000, help="requests, each its adapter")
    sizes.add_argument("--rate", type=_rate, help="of online; default: 70%% of its throughput")
    sizes.add_argument("--num-cold", type=_count, default=20, help="adapters loaded when idle")
    sizes.add_argument(
        "--long-prompt-len", type=_count, default=3072, help="before --streams of --prompt-len"
    )
    sizes.add_argument("--load-tokens", type=_count, default=512, help="of streams beside loads")
    sizes.add_argument("--load-rate", type=_rate, default=20.0, help="adapters loaded a second")


def _problem(args: argparse.Namespace) -> str | None:
    """What is wrong with arguments that are right one by one."""
    if args.backend in PEERS:
        problem = _problem_of_peer(args)
        if problem is not None:
            return problem
    if args.device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device; --device cpu tries the benchmark out"
    if args.device == "cpu" and "sync-free" in args.workloads:
        return "sync-free is about CUDA"
    if args.sync_trace is not None and "sync-free" not in args.workloads:
        return "--sync-trace is of the workload sync-free"
    if "prefix" in args.workloads and len(args.workloads) > 1:
        return "prefix runs alone: the others run without a prefix cache"
    if args.decode_steps < 2:
        return f"--decode-steps is {args.decode_steps}; it must be at least 2"
    if args.lengths[0] > args.lengths[1]:
        return f"--lengths are {args.lengths}; the first must be at most the second"
    if min(args.num_adapters) < 0:
        return f"--num-adapters are {args.num_adapters}; each must be at least 0"
    return None


def _problem_of_peer(args: argparse.Namespace) -> str | None:
    name, workloads = args.backend, PEERS[args.backend]
    if importlib.util.find_spec(name) is None:
        return f"--backend {name}: the package {name} is not installed"
    for workload in args.workloads:
        if workload not in workloads:
            return f"--backend {name} has no {workload}; it has {', '.join(workloads)}"
    for option in ("profile", "sync_trace", "check", "num_pool_tokens", "admission_output_tokens"):
        if getattr(args, option):
            return f"--{option.replace('_', '-')} is of --backend ours"
    if name == "vllm" and args.device == "cpu":
        return "--backend vllm runs on CUDA"
    return None


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 0 and below 1")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    backend = BACKENDS[args.backend](args)
    settings = {
        "backend": args.backend,
        "shape": args.shape,
        "setting": args.setting,
        **backend.settings,
    }
    for name in args.workloads:
        for row in backend.rows(name):
            publish(make_row("engine", {"workload": name, **row}, settings, SEED), args.output)


if __name__ == "__main__":
    main()
