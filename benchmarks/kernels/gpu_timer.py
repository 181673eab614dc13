"""How long a GPU takes for a call without the host, and what a copy reaches on the same GPU.

It knows no kernel. Every benchmark of kernels measures with it, so that their figures compare.
"""

import math
import statistics
import sys
from collections.abc import Callable, Sequence

import torch

# What a graph holds at least. The GPU takes about 2 us to pass from one replay to the next, which
# must be little beside a replay.
MIN_GRAPH_CALLS = 20
MIN_GRAPH_US = 1000.0
COPY_BYTES = 2**30


def require_cuda() -> None:
    """End the script, with a message, where there is no GPU."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark measures a GPU")


def graph_time_us(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Microseconds a call takes on the GPU, on average over `calls`; the median of `repeats`.

    Each call runs once by itself, which compiles its kernels. Then one CUDA graph is captured that
    runs all of them one after another, as many rounds as fill about a millisecond, and replayed
    `repeats` times back to back with an event between. So a figure holds all kernels of a call and
    the GPU's gaps between them, and no work of the host.

    The cache is as cold as the calls leave it: give calls over different inputs that together
    exceed the L2 cache several times. What calls return is kept until the next round, so that
    their outputs are as cold.

    Args:
        calls: at least one; each may be captured, and is called again and again.
        repeats: replays that the median is taken over.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    graph = _capture(calls, 1, stream)
    rounds = rounds_of(len(calls), statistics.median(_replay_us(graph, 3)))
    if rounds > 1:
        graph = _capture(calls, rounds, stream)
    return statistics.median(_replay_us(graph, repeats)) / (rounds * len(calls))


def copy_bandwidth(repeats: int = 20) -> float:
    """Bytes a second, read and written both counted, of copying 1 GiB on the GPU; the median.

    The faster of torch's copy, which is the driver's, and of an elementwise kernel, which reaches
    a fifth more on an H100; inside a CUDA graph.
    """
    source = torch.empty(COPY_BYTES // 4, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    calls = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    us = min(graph_time_us([call], repeats) for call in calls)
    return 2 * COPY_BYTES / us * 1e6


def rounds_of(num_calls: int, round_us: float) -> int:
    """How often a graph repeats calls that take `round_us` together."""
    return max(math.ceil(MIN_GRAPH_CALLS / num_calls), math.ceil(MIN_GRAPH_US / max(round_us, 1.0)))


def _capture(
    calls: Sequence[Callable[[], object]], rounds: int, stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = []
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            kept = [call() for call in calls]
    # Not before the capture ends: the last round's outputs are then as cold as the others'.
    del kept
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph, repeats: int) -> list[float]:
    """The time of each of `repeats` replays, after one that is not measured."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    graph.replay()
    # All are queued before the first has ended, so that the GPU never waits for the host.
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    events[-1].synchronize()
    return [
        start.elapsed_time(end) * 1e3 for start, end in zip(events[:-1], events[1:], strict=True)
    ]
