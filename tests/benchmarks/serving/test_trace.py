"""Workloads have the distributions they claim, and are the same every time."""

import random
import statistics
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.serving.trace import POPULARITIES, TraceConfig, make_trace, power_law_adapters

CONFIG = TraceConfig(
    num_adapters=50,
    rate=10,
    duration_s=400,
    input_range=(8, 32),
    output_range=(4, 16),
    vocab_size=1000,
    seed=7,
)
KNOWN_DUE_S = [4.075715, 5.316621, 5.393368]
KNOWN_REQUESTS = [
    (7, 11, (721, 607)),
    (37, 9, (836, 381)),
    (9, 6, (701, 282, 823)),
]


def gaps(config):
    times = [0.0, *(request.due_s for request in make_trace(config))]
    return [after - before for before, after in pairwise(times)]


def test_the_same_config_gives_the_same_trace():
    assert make_trace(CONFIG) == make_trace(CONFIG)
    assert make_trace(CONFIG) != make_trace(replace(CONFIG, seed=8))


def test_a_known_trace():
    """Nothing of the machine or the Python version may change a published workload."""
    trace = make_trace(replace(CONFIG, rate=1, duration_s=3, input_range=(2, 3)))
    assert [round(request.due_s, 6) for request in trace] == KNOWN_DUE_S
    assert [(r.adapter, r.output_len, r.prompt_ids) for r in trace] == KNOWN_REQUESTS


def test_lengths_and_ids_are_in_range():
    trace = make_trace(CONFIG)
    assert len(trace) == 4000
    assert {len(request.prompt_ids) for request in trace} == set(range(8, 33))
    assert {request.output_len for request in trace} == set(range(4, 17))
    assert all(min(r.prompt_ids) >= 256 and max(r.prompt_ids) < 1000 for r in trace)


def test_a_trace_that_comes_at_once_is_otherwise_the_same():
    spread, at_once = make_trace(CONFIG), make_trace(replace(CONFIG, at_once=True))
    assert [replace(request, due_s=0.0) for request in spread] == at_once


@pytest.mark.parametrize("cv", [0.5, 1, 3])
def test_arrivals_have_the_rate_and_the_variation(cv):
    values = gaps(replace(CONFIG, cv=cv))
    assert min(values) >= 0
    mean = statistics.mean(values)
    assert mean == pytest.approx(0.1, rel=0.15)
    assert statistics.stdev(values) / mean == pytest.approx(cv, rel=0.15)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1, 2])
def test_the_power_law_is_that_of_s_lora(alpha):
    """Adapters below a share s of all get the share s ** alpha of the requests."""
    drawn = power_law_adapters(alpha, 20_000, 100, random.Random(1))
    assert set(drawn) <= set(range(100))
    for share in (0.1, 0.5):
        part = sum(adapter < 100 * share for adapter in drawn) / len(drawn)
        assert part == pytest.approx(share**alpha, abs=0.02)


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_popularity(popularity):
    trace = make_trace(replace(CONFIG, popularity=popularity))
    counts = Counter(request.adapter for request in trace)
    assert set(counts) <= set(range(50))
    if popularity == "identical":
        assert set(counts) == {0}
    elif popularity == "distinct":
        assert set(counts.values()) == {80}
    elif popularity in ("zipf", "skewed"):
        assert counts[0] > 3 * counts[10]


def test_the_number_of_adapters_changes_nothing_else():
    def rest(num_adapters):
        trace = make_trace(replace(CONFIG, num_adapters=num_adapters))
        return [(request.due_s, request.prompt_ids, request.output_len) for request in trace]

    assert rest(0) == rest(1) == rest(1000)
    assert {r.adapter for r in make_trace(replace(CONFIG, num_adapters=0))} == {None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_adapters", -1),
        ("rate", 0),
        ("duration_s", -1),
        ("cv", 0),
        ("alpha", 0),
        ("popularity", "fair"),
        ("input_range", (0, 4)),
        ("output_range", (5, 4)),
        ("vocab_size", 10),
    ],
)
def test_wrong_values_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        replace(CONFIG, **{name: value})
