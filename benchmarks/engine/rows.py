"""The workloads that every backend has: their cases, and what each is to the base model.

A backend gives the figures of one case; its requests and adapters are the same for all.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Figures from a number of requests and of adapters among them.
Measure = Callable[[int, int], dict[str, Any]]


def decode_rows(measure: Measure, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each batch of the base model, of one adapter and of as many adapters as requests."""
    for batch in args.batches:
        for row in _cases(measure, batch, (0, 1, batch), "decode_step_ms", args.base_only):
            yield {"batch": batch, **row}


def prefill_rows(measure: Measure, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    batch = args.streams
    for row in _cases(measure, batch, (0, 1, batch), "prefill_ms", args.base_only):
        yield {"batch": batch, **row}


def trace_rows(measure: Measure, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    counts = args.num_adapters
    yield from _cases(measure, args.num_requests, counts, "requests_per_s", args.base_only)


def spread_rows(measure: Measure, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Requests of the base model, then the same of as many adapters."""
    counts = (0, args.num_spread)
    yield from _cases(measure, args.num_spread, counts, "requests_per_s", args.base_only)


def _cases(
    measure: Measure, num_requests: int, counts: Sequence[int], figure: str, base_only: bool
) -> Iterator[dict[str, Any]]:
    """A row for each number of adapters, 0 for the base model; ratios once that is measured."""
    base = None
    for n in dict.fromkeys(counts):
        if n and base_only:
            continue
        row = {"num_adapters": n, **measure(num_requests, n)}
        if n == 0:
            base = row[figure]
        elif base is not None:
            row["ratio_to_base"] = row[figure] / base
        yield row
