"""A wait of the host is found wherever a step has one, and no other call is taken for one."""

import pytest
import torch

from benchmarks.engine.profile import STEPS, Event, _events, waits

SPAN = Event(STEPS, 10.0, 20.0, on_host=True)


def of_step(*names):
    return [SPAN, *(Event(name, 12.0, 13.0, on_host=True) for name in names)]


STEP = ("cudaMemcpyAsync", "cudaGraphLaunch", "cudaLaunchKernel", "cudaEventSynchronize")


def test_steps_that_only_wait_for_their_tokens():
    events = [
        *of_step(*STEP, *STEP),
        Event(STEPS, 11.0, 25.0, on_host=False),
        Event("Memcpy HtoD (Pinned -> Device)", 14.0, 15.0, on_host=False),
        # The profiler's own.
        Event("cudaDeviceSynchronize", 21.0, 22.0, on_host=True),
        Event("cudaStreamSynchronize", 8.0, 9.0, on_host=True),
    ]
    figures = waits(events, 2)
    assert figures.pop("sync_free") is True
    assert figures == {
        "num_graph_launches": 2,
        "num_event_waits": 2,
        "num_pageable_copies": 0,
        "blocking_calls": {},
    }


@pytest.mark.parametrize(
    "events",
    [
        of_step(*STEP, "cudaStreamSynchronize"),
        of_step(*STEP, "cudaMalloc"),
        of_step(*STEP, "cudaEventSynchronize"),
        [*of_step(*STEP), Event("Memcpy HtoD (Pageable -> Device)", 14.0, 15.0, on_host=False)],
        # The profiler saw no calls at all.
        of_step(),
    ],
)
def test_a_wait_is_found(events):
    assert waits(events, 1)["sync_free"] is False


def test_events_of_the_profiler():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(2)
        with torch.profiler.record_function(STEPS):
            torch.zeros(3)
    events = _events(profiler.events())
    [span] = [e for e in events if e.name == STEPS]
    assert span.on_host and span.start_us < span.end_us
    inside = {e.name for e in events if span.start_us <= e.start_us and e.end_us <= span.end_us}
    assert "aten::zeros" in inside and "aten::ones" not in inside
    assert waits(events, 1)["num_graph_launches"] == 0
