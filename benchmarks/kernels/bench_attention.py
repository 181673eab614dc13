"""Paged attention kernels on one GPU beside the bandwidth of a copy, in one run.

`python -m benchmarks.kernels.bench_attention`: decode and prefill batches of a Llama-7B's heads,
with 32 KV heads and with 8, over scattered pages. Every case is first compared with the torch twin;
where they differ there is no report. Calls run inside CUDA graphs over layers in turn, so that the
L2 cache is cold. `--sweep` tries launch and plan parameters as well.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.attention_cases import (
    PAGE_TOKENS,
    AttentionCase,
    AttentionInputs,
    make_inputs,
    standard_cases,
)
from benchmarks.kernels.attention_sweep import (
    TimeUs,
    compile_all,
    describe,
    fastest,
    sweep,
    sweep_table,
)
from benchmarks.kernels.gpu_timer import copy_bandwidth, graph_time_us, require_cuda
from benchmarks.report import add_output_option, make_row, publish

# What launch parameters are chosen by.
SWEPT = (
    "decode 64 x",
    "decode 8 x 16384, 8 KV heads",
    "decode 1 x",
    "prefill 16 x",
    "prefill 1 x",
)


class WrongResultError(RuntimeError):
    """A kernel and its twin differ."""


def run(
    pool: torch.Tensor,
    cases: Sequence[AttentionCase],
    seed: int,
    time_us: TimeUs,
    copy_bytes_per_s: float,
) -> list[dict[str, Any]]:
    """Check all cases, then measure each; one that cannot run is a row with its error.

    Raises:
        WrongResultError: a result is not that of the twin.
    """
    batches = [make_inputs(pool, case, seed) for case in cases]
    errors = {}
    for batch in batches:
        try:
            batch.check()
        except AssertionError as error:
            raise WrongResultError(f"{batch.case.name}: {error}") from error
        except Exception as error:
            errors[batch.case.name] = describe(error)
    rows = []
    for batch in batches:
        name = batch.case.name
        row = {"case": name, "error": errors[name]} if name in errors else _row(batch, time_us)
        if "us" in row:
            row["of_copy"] = round(row["tb_per_s"] * 1e12 / copy_bytes_per_s, 3)
        rows.append(row)
    return rows


def _row(batch: AttentionInputs, time_us: TimeUs) -> dict[str, Any]:
    case = batch.case
    try:
        us = time_us(batch.calls())
    except Exception as error:
        return {"case": case.name, "error": describe(error)}
    return {
        "case": case.name,
        "us": round(us, 2),
        "tb_per_s": round(case.kv_bytes / us / 1e6, 3),
        "tflop_per_s": round(case.flops / us / 1e6, 1),
        "num_layers": batch.kv_cache.shape[1],
    }


def table(rows: Sequence[dict[str, Any]], copy_bytes_per_s: float) -> str:
    """Bandwidth of KV for decodes, arithmetic for prefills."""
    lines = [f"{'':<38}{'us':>10}{'TB/s':>8}{'of copy':>9}{'TFLOP/s':>9}"]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['case']:<38}{row['error']}")
            continue
        figures = f"{row['tb_per_s']:>8.2f}{row['of_copy']:>9.1%}{'':>9}"
        if row["case"].startswith("prefill"):
            figures = f"{'':>17}{row['tflop_per_s']:>9.1f}"
        lines.append(f"{row['case']:<38}{row['us']:>10.1f}{figures}")
    return "\n".join([*lines, f"copy: {copy_bytes_per_s / 1e12:.2f} TB/s"])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="try launch and plan parameters")
    parser.add_argument(
        "--sweep-time", type=float, default=40.0, help="seconds of the sweep after compiling"
    )
    parser.add_argument("--pool-gib", type=float, default=44.0, help="memory of the KV pool")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    add_output_option(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    require_cuda()
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {line}", file=sys.stderr)

    dtype = torch.bfloat16
    if args.sweep:
        say("compiling the variants of the sweep")
        compile_all(dtype, timeout_s=45.0)
    say(f"filling a pool of {args.pool_gib:g} GiB")
    pool = torch.empty(int(args.pool_gib * 2**29), dtype=dtype, device="cuda").normal_()
    cases = [case for case in standard_cases(args.seed) if args.only in case.name]
    copy_bytes_per_s = copy_bandwidth()
    say("checking and measuring")
    try:
        rows = run(pool, cases, args.seed, graph_time_us, copy_bytes_per_s)
    except WrongResultError as error:
        sys.exit(f"no report: {error}")
    print(table(rows, copy_bytes_per_s), flush=True)
    figures: dict[str, Any] = {"copy_bytes_per_s": round(copy_bytes_per_s), "rows": rows}
    if args.sweep:
        say("sweeping")
        swept = [make_inputs(pool, case, args.seed) for case in cases if _is_swept(case)]
        tried = sweep(swept, partial(graph_time_us, repeats=5), args.sweep_time)
        print(sweep_table(tried), flush=True)
        figures["sweep"] = fastest(tried, 3)
    say("done")
    config = {"dtype": "bfloat16", "page_tokens": PAGE_TOKENS, "pool_gib": args.pool_gib}
    publish(make_row("attention", figures, config, args.seed), args.output)


def _is_swept(case: AttentionCase) -> bool:
    return case.name.startswith(SWEPT)


if __name__ == "__main__":
    main()
