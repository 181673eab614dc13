"""The engine alone, without a server: decode steps, prefill and traces on dummy weights.

    python -m benchmarks.bench_engine --shape llama-7b --setting S1 --check decode prefill trace

One engine is built for all measurements of a run; each prints one JSON row. `--check` first
compares logits with transformers on the same random weights and refuses to go on where they
differ.
"""

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_check import check_logits
from benchmarks.engine_workloads import (
    SETTINGS,
    SHAPES,
    DummyAdapters,
    adapter_name,
    fixed_batch,
    trace,
)
from benchmarks.report import add_output_option, make_row, publish
from slora_core.config import EngineConfig
from slora_core.engine import Engine, GenerationRequest
from slora_core.models.weights import dummy_weights
from slora_core.types import Request
from tests.popularity import draw_adapters

PROMPT_LEN, DECODE_STEPS = 512, 128
DECODE_BATCHES = (1, 32, 64, 128)
TRACE_REQUESTS = 512
SEED = 0


class Bench:
    """An engine with dummy adapters, and what one measures on it."""

    def __init__(self, engine: Engine, adapters: DummyAdapters) -> None:
        self._engine = engine
        self._adapters = adapters
        self._num_requests = 0

    def decode(self, batch: int, num_adapters: int) -> dict[str, Any]:
        """ms of a decode step: `batch` prompts of 512, then 128 steps, after one warm run."""
        adapters = self._round_robin(batch, num_adapters)
        requests = fixed_batch(adapters, PROMPT_LEN, DECODE_STEPS, self._vocab_size, SEED)
        self._run(requests)
        live = self._add(requests)
        while any(request.num_computed < PROMPT_LEN for request in live):
            self._engine.step()
        self._settle()
        started, first = time.perf_counter(), self._engine.stats().num_steps
        while self._engine.has_work:
            self._engine.step()
        seconds = time.perf_counter() - started
        steps = self._engine.stats().num_steps - first
        return {"decode_step_ms": 1e3 * seconds / steps, "num_steps": steps}

    def prefill(self, batch: int, num_adapters: int) -> dict[str, Any]:
        """ms until `batch` prompts of 512 are computed and each has its first token."""
        adapters = self._round_robin(batch, num_adapters)
        requests = fixed_batch(adapters, PROMPT_LEN, 1, self._vocab_size, SEED)
        self._run(requests)
        best = min(self._run(requests) for _ in range(2))
        return {"prefill_ms": 1e3 * best, "tokens_per_s": batch * PROMPT_LEN / best}

    def trace(self, num_adapters: int, num_requests: int = TRACE_REQUESTS) -> dict[str, Any]:
        """All requests at once, lengths in and out uniform in [8, 512], adapters by zipf(1)."""
        adapters: Sequence[int | None] = [None] * num_requests
        if num_adapters:
            adapters = draw_adapters("zipf", num_requests, num_adapters, SEED)
        requests = trace(adapters, self._vocab_size, SEED)
        before = self._engine.stats()
        seconds = self._run(requests)
        after = self._engine.stats()
        tokens = sum(request.params.max_tokens for request in requests)
        return {
            "requests_per_s": num_requests / seconds,
            "output_tokens_per_s": tokens / seconds,
            "seconds": seconds,
            "num_steps": after.num_steps - before.num_steps,
            "num_preemptions": after.num_preemptions - before.num_preemptions,
            "adapter_loads": after.num_adapter_loads - before.num_adapter_loads,
            "adapter_evictions": after.num_adapter_evictions - before.num_adapter_evictions,
        }

    def mixed(self, batch: int, chunk: int) -> dict[str, Any]:
        """ms of a step of `batch` decodes and a prompt of `chunk` tokens, one after another."""
        requests = fixed_batch([None] * batch, PROMPT_LEN, 64, self._vocab_size, SEED)
        prompts = fixed_batch([None] * 32, chunk, 1, self._vocab_size, SEED + 1)
        live = self._add(requests)
        while any(request.num_computed < PROMPT_LEN for request in live):
            self._engine.step()
        started = 0.0
        for index, prompt in enumerate(prompts):
            if index == len(prompts) // 2:
                self._settle()
                started = time.perf_counter()
            self._add([prompt])
            self._engine.step()
        self._settle()
        seconds = time.perf_counter() - started
        while self._engine.has_work:
            self._engine.step()
        return {"mixed_step_ms": 1e3 * seconds / (len(prompts) - len(prompts) // 2)}

    def profile(self, batch: int, num_adapters: int, path: Path) -> None:
        """Write what the GPU does in eight decode steps, kernel by kernel, to `path`."""
        adapters = self._round_robin(batch, num_adapters)
        requests = fixed_batch(adapters, PROMPT_LEN, 16, self._vocab_size, SEED)
        live = self._add(requests)
        while any(request.num_computed < PROMPT_LEN + 4 for request in live):
            self._engine.step()
        self._settle()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(8):
                self._engine.step()
            self._settle()
        while self._engine.has_work:
            self._engine.step()
        table = profiler.key_averages().table(
            sort_by="cuda_time_total", row_limit=40, max_name_column_width=90
        )
        with path.open("a") as file:
            file.write(f"8 decode steps, batch {batch}, {num_adapters} adapters\n{table}\n")

    @property
    def _vocab_size(self) -> int:
        return self._engine.model.vocab_size

    def _round_robin(self, batch: int, num_adapters: int) -> list[int | None]:
        return [i % num_adapters if num_adapters else None for i in range(batch)]

    def _add(self, requests: Sequence[GenerationRequest]) -> list[Request]:
        live = []
        for entry in requests:
            if entry.adapter_id is not None and not self._engine.has_adapter(entry.adapter_id):
                index = int(entry.adapter_id.removeprefix(adapter_name(0)[:-1]))
                self._engine.add_adapter(self._adapters[index])
            self._num_requests += 1
            request = Request(
                f"bench-{self._num_requests}",
                list(entry.prompt_ids),
                entry.params,
                entry.adapter_id,
            )
            self._engine.add_request(request)
            live.append(request)
        return live

    def _run(self, requests: Sequence[GenerationRequest]) -> float:
        """Seconds from the first request's arrival to the last one's end."""
        gc.collect()
        self._settle()
        started = time.perf_counter()
        live = self._add(requests)
        while self._engine.has_work:
            self._engine.step()
        seconds = time.perf_counter() - started
        for entry, request in zip(requests, live, strict=True):
            assert len(request.output_ids) == entry.params.max_tokens
        self._engine.check_integrity()
        return seconds

    def _settle(self) -> None:
        if self._engine.config.device == "cuda":
            torch.cuda.synchronize()


def measure(
    bench: Bench, workload: str, batches: Sequence[int], num_distinct: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Rows of one workload, each with its own parameters beside its figures."""
    match workload:
        case "decode":
            for batch in batches:
                for n in dict.fromkeys((0, 1, batch)):
                    yield {"batch": batch, "num_adapters": n, **bench.decode(batch, n)}
        case "prefill":
            for n in (0, 1, 64):
                yield {"batch": 64, "num_adapters": n, **bench.prefill(64, n)}
        case "trace":
            for n in num_distinct:
                yield {"num_adapters": n, **bench.trace(n)}
        case "mixed":
            yield {"batch": 64, "chunk": 256, **bench.mixed(64, 256)}
        case _:
            raise ValueError(workload)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="+", choices=["decode", "prefill", "trace", "mixed"])
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-7b")
    parser.add_argument("--setting", choices=list(SETTINGS), default="S1")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=list(DECODE_BATCHES))
    parser.add_argument("--num-adapters", type=int, nargs="+", default=[0, 5, 1000, 2000])
    parser.add_argument("--max-running-requests", type=int, default=256)
    parser.add_argument("--max-batched-tokens", type=int, default=8192)
    parser.add_argument("--profile", type=Path, help="file for the kernels of some decode steps")
    parser.add_argument("--check", action="store_true", help="logits against transformers first")
    add_output_option(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device; --device cpu tries the benchmark out")
    started = time.perf_counter()
    model, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
    weights = dummy_weights(model, args.device, dtype)
    if args.check:
        check_logits(model, weights, args.device)
    weights_s = time.perf_counter() - started
    config = EngineConfig(
        device=args.device,
        dtype=dtype,
        num_pool_tokens=16384 if args.device == "cpu" else None,
        max_batched_tokens=args.max_batched_tokens,
        max_running_requests=args.max_running_requests,
        max_inflight_steps=1 if args.device == "cpu" else 2,
        admission_output_tokens=None,
    )
    engine = Engine(model, config, weights)
    ready_s = time.perf_counter() - started
    adapters = DummyAdapters(engine.geometry, SETTINGS[args.setting], torch.device(args.device))
    bench = Bench(engine, adapters)
    settings = {
        "shape": args.shape,
        "setting": args.setting,
        "num_pages": engine.stats().num_pages,
        "weights_s": round(weights_s, 1),
        "ready_s": round(ready_s, 1),
        **{k: str(v) for k, v in dataclasses.asdict(config).items()},
    }
    print(f"ready in {ready_s:.1f} s, {settings['num_pages']} pages", file=sys.stderr)
    if args.profile is not None:
        for batch, num_adapters in ((1, 1), (64, 0), (64, 1), (64, 64)):
            bench.profile(batch, num_adapters, args.profile)
    for workload in args.workloads:
        for figures in measure(bench, workload, args.batches, args.num_adapters):
            publish(
                make_row("engine", {"workload": workload, **figures}, settings, SEED),
                args.output,
            )


if __name__ == "__main__":
    main()
