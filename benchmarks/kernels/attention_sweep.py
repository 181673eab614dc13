"""Tries the launch and plan parameters of the attention kernels for `bench_attention --sweep`.

Knows no cases of its own. A variant that fails is a row with its error and ends nothing.
"""

import contextlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.kernels.attention_cases import AttentionCase, AttentionInputs, make_inputs
from kernels.attention_launch import AttentionLaunch
from tests.kernels.cases import TOLERANCES

# Of the numbers of stages, an even one from 4 on compiles to the same as the odd one below.
DECODE_LAUNCHES = [
    AttentionLaunch(*values) for values in itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 5, 7))
]
PREFILL_LAUNCHES = [
    AttentionLaunch(*values) for values in itertools.product((32, 64, 128), (4, 8), (2, 3, 5))
]
PREFILL_BLOCK_ROWS = (64, 128)
# Programs that splitting may add, and the least tokens of an item.
SPLIT_PROGRAMS = (512, 1024, 2048, 4096)
MIN_CHUNKS = (64, 128, 256)
NUM_COMPILERS = max(1, len(os.sched_getaffinity(0)) - 2)

TimeUs = Callable[[Sequence[Callable[[], object]]], float]
# By case and variant: microseconds, or what went wrong.
SweepRows = dict[str, dict[str, float | str]]


@dataclass(frozen=True)
class Variant:
    """A kernel to try; block_rows 0 is a decode."""

    launch: AttentionLaunch
    block_rows: int = 0

    def plan(self, inputs: AttentionInputs) -> AttentionInputs:
        """The same inputs with a plan for this kernel."""
        return inputs.with_prefill_plan(self.block_rows) if self.block_rows else inputs

    def __str__(self) -> str:
        tokens, num_warps, num_stages = self.launch
        rows = f"{self.block_rows} rows, " if self.block_rows else ""
        return f"{rows}{tokens} tokens, {num_warps} warps, {num_stages} stages"


def variants() -> list[Variant]:
    return [Variant(launch) for launch in DECODE_LAUNCHES] + [
        Variant(launch, rows) for rows in PREFILL_BLOCK_ROWS for launch in PREFILL_LAUNCHES
    ]


def compile_all(dtype: torch.dtype, timeout_s: float) -> None:
    """Fill Triton's cache on disk with all variants, in processes beside each other.

    What fails here fails again, and is reported, where it is measured.
    """
    deadline = time.monotonic() + timeout_s
    # Spawned, because CUDA does not survive a fork; ended, whatever they still do, on the way out.
    with multiprocessing.get_context("spawn").Pool(NUM_COMPILERS) as pool:
        results = [pool.apply_async(_compile, (variant, dtype)) for variant in variants()]
        for result in results:
            with contextlib.suppress(multiprocessing.TimeoutError):
                result.get(max(0.0, deadline - time.monotonic()))


def _compile(variant: Variant, dtype: torch.dtype) -> None:
    # The values that kernels are compiled for, head size and strides' divisors, as in all cases.
    chunk_lens = (8,) if variant.block_rows else ()
    case = AttentionCase("tiny", 2, 2, (40,), chunk_lens)
    with contextlib.suppress(Exception):
        pool = torch.zeros(1 << 16, dtype=dtype, device="cuda")
        variant.plan(make_inputs(pool, case, seed=0)).attend(0, variant.launch)


def sweep(batches: Sequence[AttentionInputs], time_us: TimeUs, timeout_s: float) -> SweepRows:
    """Measure until the time is over: plans first, then decode launches, then prefill launches."""
    rows: SweepRows = {batch.case.name: {} for batch in batches}
    tries: list[tuple[str, AttentionInputs, AttentionLaunch | None]] = [
        (name, planned, None)
        for batch in batches
        if not batch.case.chunk_lens
        for name, planned in _decode_plans(batch).items()
    ]
    tries += [
        (str(variant), variant.plan(batch), variant.launch)
        for variant in variants()
        for batch in batches
        if bool(batch.case.chunk_lens) == bool(variant.block_rows)
    ]
    expected = {batch.case.name: batch.twin(0) for batch in batches}
    deadline = time.monotonic() + timeout_s
    for index, (name, planned, launch) in enumerate(tries):
        if time.monotonic() > deadline:
            rows[f"not tried for lack of time: {len(tries) - index}"] = {}
            break
        case_name = planned.case.name
        rows[case_name][name] = _measure(planned, launch, expected[case_name], time_us)
    return rows


def _decode_plans(batch: AttentionInputs) -> dict[str, AttentionInputs]:
    case = batch.case
    return {
        f"{programs} programs more, chunks from {chunk}": batch.with_decode_plan(
            len(case.context_lens) + -(-programs // case.num_kv_heads), chunk
        )
        for programs in SPLIT_PROGRAMS
        for chunk in MIN_CHUNKS
    }


def _measure(
    inputs: AttentionInputs,
    launch: AttentionLaunch | None,
    expected: torch.Tensor,
    time_us: TimeUs,
) -> float | str:
    rtol, atol = TOLERANCES[expected.dtype]
    try:
        # Two roundings of the same result, each within the tolerance of the truth.
        if not torch.allclose(inputs.attend(0, launch), expected, rtol=2 * rtol, atol=2 * atol):
            return "wrong result"
        return round(time_us(inputs.calls(launch)), 2)
    except Exception as error:
        return describe(error)


def describe(error: Exception) -> str:
    """An error as one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


def fastest(rows: SweepRows, count: int) -> SweepRows:
    """The `count` fastest variants of each case, in order."""
    return {
        case_name: dict(sorted(_times(results).items(), key=lambda item: item[1])[:count])
        for case_name, results in rows.items()
    }


def sweep_table(rows: SweepRows, num_fastest: int = 6) -> str:
    """The fastest variants of each case, and how many failed how."""
    lines = []
    for case_name, best in fastest(rows, num_fastest).items():
        lines.append(case_name)
        lines += [f"  {name:<46}{us:>10.1f}" for name, us in best.items()]
        errors = [value for value in rows[case_name].values() if isinstance(value, str)]
        lines += [f"  {errors.count(error)} failed: {error}" for error in sorted(set(errors))]
    return "\n".join(lines)


def _times(results: dict[str, float | str]) -> dict[str, float]:
    return {name: value for name, value in results.items() if not isinstance(value, str)}
