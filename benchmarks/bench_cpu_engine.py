"""Tokens a second of the engine on a CPU beside those of `transformers.generate`, in one run.

`python -m benchmarks.bench_cpu_engine`: one stream of the base model, one stream of an adapter
(beside PEFT), and many streams over all adapters and the base. Every text is first compared with
the one that transformers and PEFT give, token for token; where they differ there is no report.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.demo_model import ensure_demo_model
from benchmarks.demo_tasks import TASKS, held_out_examples, messages
from benchmarks.report import ROOT, provenance
from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig, SamplingParams
from slora_core.engine import Engine, GenerationRequest
from tests.oracle import GreedyOracle, TextsDifferError, assert_same_greedy, comparisons


@dataclass(frozen=True)
class Stream:
    """One request of the benchmark; `adapter` None is the base model."""

    prompt_ids: list[int]
    adapter: str | None


class Candidate:
    """This repository's engine, in this process."""

    def __init__(
        self, model_dir: Path, adapter_dirs: dict[str, Path], config: EngineConfig
    ) -> None:
        self._engine = Engine.from_pretrained(model_dir, config)
        self._adapter_ids: dict[str | None, str | None] = {None: None}
        for name, path in adapter_dirs.items():
            packed = load_packed_adapter(path, self._engine.geometry)
            self._engine.add_adapter(packed)
            self._adapter_ids[name] = packed.adapter_id

    def generate(self, streams: Sequence[Stream], num_tokens: int) -> list[list[int]]:
        """Run all streams at once."""
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        return self._engine.generate(
            [GenerationRequest(s.prompt_ids, params, self._adapter_ids[s.adapter]) for s in streams]
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

    The first stream of the base model and the first of an adapter are also run alone.

    Raises:
        TextsDifferError: a text is not that of transformers.
    """
    say(f"comparing {len(streams)} streams of {num_tokens} tokens with transformers")
    for stream in {stream.adapter: stream for stream in streams}.values():
        # Adapters load when they are first asked for, which is not to be measured.
        oracle.logits(stream.prompt_ids, stream.adapter)
    started = time.perf_counter()
    for stream in streams:
        oracle.generate(stream.prompt_ids, num_tokens, stream.adapter)
    one_by_one = len(streams) * num_tokens / (time.perf_counter() - started)
    base = next(stream for stream in streams if stream.adapter is None)
    adapter = next(stream for stream in streams if stream.adapter is not None)
    num_forgiven_before = comparisons.num_forgiven
    for batch in (streams, [base], [adapter]):
        for stream, text in zip(batch, candidate.generate(batch, num_tokens), strict=True):
            expected = oracle.generate(stream.prompt_ids, num_tokens, stream.adapter)
            assert_same_greedy(oracle, stream.prompt_ids, text, expected, stream.adapter)

    say(f"measuring, {repeats} times each in turn")
    rates = _measure_in_turn(
        {
            "transformers, base, 1 stream": (
                1,
                lambda: oracle.generate_anew(base.prompt_ids, num_tokens),
            ),
            "engine, base, 1 stream": (1, lambda: candidate.generate([base], num_tokens)),
            "PEFT, adapter, 1 stream": (
                1,
                lambda: oracle.generate_anew(adapter.prompt_ids, num_tokens, adapter.adapter),
            ),
            "engine, adapter, 1 stream": (1, lambda: candidate.generate([adapter], num_tokens)),
            f"engine, mixed, {len(streams)} streams": (
                len(streams),
                lambda: candidate.generate(streams, num_tokens),
            ),
        },
        num_tokens,
        repeats,
    )
    hf_base, our_base, hf_adapter, our_adapter, mixed = rates.values()
    return {
        "tokens_per_s": {
            **{name: round(rate, 2) for name, rate in rates.items()},
            f"transformers and PEFT, mixed, {len(streams)} streams one by one": round(
                one_by_one, 2
            ),
        },
        "ratios": {
            "base_to_transformers": round(our_base / hf_base, 3),
            "adapter_to_peft": round(our_adapter / hf_adapter, 3),
            "adapter_to_base": round(our_adapter / our_base, 3),
            "mixed_to_one_stream": round(mixed / our_base, 3),
            "mixed_to_transformers_one_stream": round(mixed / hf_base, 3),
        },
        "num_near_ties": comparisons.num_forgiven - num_forgiven_before,
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


def task_streams(model_dir: Path, adapter_names: Sequence[str], num_streams: int) -> list[Stream]:
    """Held-out questions of the demo's tasks, base and adapters in turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tasks = list(TASKS)
    adapters = [None, *adapter_names]
    streams = []
    for index in range(num_streams):
        adapter = adapters[index % len(adapters)]
        # An adapter that has no task here, or the base, is asked the tasks in turn.
        task = adapter if adapter in TASKS else tasks[index % len(tasks)]
        example = held_out_examples(task, index + 1)[index]
        prompt_ids = tokenizer.apply_chat_template(
            messages(example), add_generation_prompt=True, return_dict=False
        )
        streams.append(Stream(prompt_ids, adapter))
    return streams


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model directory (default: the demo model)")
    parser.add_argument("--adapters", type=Path, default=ROOT / "serve_configs" / "adapters")
    parser.add_argument("--num-streams", type=int, default=16)
    parser.add_argument("--num-tokens", type=int, default=64, help="output tokens a stream")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
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
    settings = {
        "num_streams": args.num_streams,
        "num_tokens": args.num_tokens,
        "repeats": args.repeats,
        "threads": args.threads,
        "adapters": list(adapter_dirs),
        "dtype": "float32",
        # Over the number of cores: something else ran beside the benchmark.
        "load_average": os.getloadavg()[0],
    }
    print(table(result))
    print(json.dumps({"benchmark": "cpu_engine", **result, **settings, **provenance()}))


if __name__ == "__main__":
    main()
