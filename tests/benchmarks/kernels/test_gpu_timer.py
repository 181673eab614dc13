"""What the GPU timer decides without a GPU, and its figures beside each other with one."""

import pytest
import torch

from benchmarks.kernels import gpu_timer
from tests.on_gpu import gpu_test


@pytest.mark.parametrize(
    "num_calls,round_us,rounds",
    [(1, 2.0, 500), (1, 1e4, 20), (4, 1e4, 5), (19, 1e4, 2), (40, 1e4, 1), (40, 80.0, 13)],
)
def test_rounds_fill_a_graph(num_calls: int, round_us: float, rounds: int) -> None:
    assert gpu_timer.rounds_of(num_calls, round_us) == rounds


def test_calls_that_launch_nothing_end() -> None:
    assert gpu_timer.rounds_of(3, 0.0) == gpu_timer.MIN_GRAPH_US


def test_without_a_gpu_a_benchmark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_timer.require_cuda()


@gpu_test
def test_a_copy_takes_as_long_as_its_bandwidth_says() -> None:
    bandwidth = gpu_timer.copy_bandwidth(repeats=5)
    num_bytes = 2**28
    pairs = [torch.empty(2, num_bytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
    us = gpu_timer.graph_time_us([lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs])
    assert 2 * num_bytes / us * 1e6 == pytest.approx(bandwidth, rel=0.25)
