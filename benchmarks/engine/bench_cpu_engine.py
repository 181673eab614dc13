"""Tokens a second of the engine on a CPU beside those of `transformers.generate`, in one run.

`python -m benchmarks.engine.bench_cpu_engine`: one stream of the base model, one stream of an
adapter (beside PEFT), and many streams over all adapters and the base. Every text is first compared
with the one that transformers and PEFT give, token for token; where they differ there is no report.
With `--check` the exit status is 1 where the engine is slower than it must be.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from app.models.demo import ensure_demo_model
from benchmarks.demo.demo_tasks import HELD_OUT_SEED
from benchmarks.engine.streams import Candidate, Stream, compare, one_of_each, task_streams
from benchmarks.report import ROOT, add_output_option, make_row, publish
from slora_core.config import EngineConfig
from tests.oracle import GreedyOracle, TextsDifferError, comparisons

# Ratios that `--check` looks at: name, words, least value; the last is for the default 16 streams.
LIMITS = (
    ("base_to_transformers", "one base stream to transformers", 1.0),
    ("mixed_to_one_stream", "all mixed streams to one base stream", 4.0),
)


def run(
    oracle: GreedyOracle,
    candidate: Candidate,
    streams: Sequence[Stream],
    num_tokens: int,
    repeats: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Check the streams' texts, then measure; rows of tokens a second and what they are ratios of.

    Raises:
        TextsDifferError: a text is not that of transformers.
    """
    say(f"comparing {len(streams)} streams of {num_tokens} tokens with transformers")
    one_by_one = _measure_one_by_one(oracle, streams, num_tokens)
    num_forgiven_before = comparisons.num_forgiven
    compare(oracle, candidate, streams, num_tokens)
    num_near_ties = comparisons.num_forgiven - num_forgiven_before
    say(f"measuring, {repeats} times each in turn")
    rates = _measure_in_turn(_cases(oracle, candidate, streams, num_tokens), num_tokens, repeats)
    ratios = _ratios(*rates.values())
    rates[f"transformers and PEFT, mixed, {len(streams)} streams one by one"] = one_by_one
    return {
        "tokens_per_s": {name: round(rate, 2) for name, rate in rates.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "num_near_ties": num_near_ties,
    }


def _measure_one_by_one(oracle: GreedyOracle, streams: Sequence[Stream], num_tokens: int) -> float:
    """Tokens a second of transformers and PEFT; the oracle keeps the texts for comparing."""
    for stream in {stream.adapter: stream for stream in streams}.values():
        # Adapters load when they are first asked for, which is not to be measured.
        oracle.logits(stream.prompt_ids, stream.adapter)
    started = time.perf_counter()
    for stream in streams:
        oracle.generate(stream.prompt_ids, num_tokens, stream.adapter)
    return len(streams) * num_tokens / (time.perf_counter() - started)


def _cases(
    oracle: GreedyOracle, candidate: Candidate, streams: Sequence[Stream], num_tokens: int
) -> dict[str, tuple[int, Callable[[], Any]]]:
    """What is measured by name: how many streams, and a call that runs them."""
    base, adapter = one_of_each(streams)

    def alone(stream: Stream) -> Callable[[], Any]:
        return lambda: oracle.generate_anew(stream.prompt_ids, num_tokens, stream.adapter)

    def together(batch: Sequence[Stream]) -> Callable[[], Any]:
        return lambda: candidate.generate(batch, num_tokens)

    return {
        "transformers, base, 1 stream": (1, alone(base)),
        "engine, base, 1 stream": (1, together([base])),
        "PEFT, adapter, 1 stream": (1, alone(adapter)),
        "engine, adapter, 1 stream": (1, together([adapter])),
        f"engine, mixed, {len(streams)} streams": (len(streams), together(streams)),
    }


def _ratios(
    hf_base: float, our_base: float, hf_adapter: float, our_adapter: float, mixed: float
) -> dict[str, float]:
    """What the rates of `_cases`, in its order, are of each other."""
    return {
        "base_to_transformers": our_base / hf_base,
        "adapter_to_peft": our_adapter / hf_adapter,
        "adapter_to_base": our_adapter / our_base,
        "mixed_to_one_stream": mixed / our_base,
        "mixed_to_transformers_one_stream": mixed / hf_base,
    }


def _measure_in_turn(
    cases: dict[str, tuple[int, Callable[[], Any]]], num_tokens: int, repeats: int
) -> dict[str, float]:
    """Tokens a second of the fastest run of each case, the cases in turn.

    The fastest, because whatever else the machine does can only make a run slower.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, (_, call) in cases.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {
        name: num_streams * num_tokens / min(seconds[name])
        for name, (num_streams, _) in cases.items()
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{name:<56}{rate:>9.1f} tokens/s" for name, rate in result["tokens_per_s"].items()]
    lines += [f"{name:<56}{ratio:>9.2f} x" for name, ratio in result["ratios"].items()]
    return "\n".join([*lines, f"{result['num_near_ties']} near ties forgiven"])


def below_limits(ratios: dict[str, float]) -> str | None:
    """Both ratios that `--check` looks at beside their limits; None where they are kept."""
    if all(ratios[name] >= limit for name, _, limit in LIMITS):
        return None
    return "too slow: " + ", ".join(
        f"{words} is {ratios[name]:g}x (at least {limit:g}x)" for name, words, limit in LIMITS
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model directory (default: the demo model)")
    parser.add_argument("--adapters", type=Path, default=ROOT / "serve_configs" / "adapters")
    parser.add_argument("--num-streams", type=int, default=16)
    parser.add_argument("--num-tokens", type=int, default=64, help="output tokens a stream")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    limits = "; ".join(f"{words}: {limit:g}x" for _, words, limit in LIMITS)
    parser.add_argument("--check", action="store_true", help=f"exit 1 below the limits ({limits})")
    add_output_option(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    adapter_dirs = {
        path.parent.name: path.parent
        for path in sorted(args.adapters.glob("*/adapter_config.json"))
    }
    if not adapter_dirs:
        sys.exit(f"no adapters in {args.adapters}")
    if args.num_streams <= 1:
        sys.exit(f"--num-streams is {args.num_streams}; it must be at least 2")
    torch.set_num_threads(args.threads)
    model_dir = args.model or ensure_demo_model()
    streams = task_streams(model_dir, list(adapter_dirs), args.num_streams)
    config = EngineConfig(max_running_requests=args.num_streams)
    try:
        result = run(
            GreedyOracle(model_dir, adapter_dirs, ignore_eos=True),
            Candidate(model_dir, adapter_dirs, config),
            streams,
            args.num_tokens,
            args.repeats,
            lambda line: print(line, file=sys.stderr),
        )
    except TextsDifferError as error:
        sys.exit(f"no report: {error}")
    # Over the number of cores: something else ran beside the benchmark.
    result["load_average"] = os.getloadavg()[0]
    settings = {
        "model": model_dir.name,
        "num_streams": args.num_streams,
        "num_tokens": args.num_tokens,
        "repeats": args.repeats,
        "threads": args.threads,
        "adapters": list(adapter_dirs),
        "dtype": "float32",
    }
    print(table(result))
    # The prompts are the first held-out examples; nothing else is random.
    publish(make_row("cpu_engine", result, settings, HELD_OUT_SEED), args.output)
    if args.check and (problem := below_limits(result["ratios"])):
        sys.exit(problem)


if __name__ == "__main__":
    main()
