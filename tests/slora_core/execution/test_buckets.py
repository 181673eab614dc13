"""Batch sizes and ranks that steps are padded to."""

import pytest

from slora_core.config import EngineConfig
from slora_core.execution.buckets import RANK_BUCKETS, batch_buckets, bucket_of, max_graph_rows


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7, 8, 64, 65, 200, 256, 1000])
def test_batch_sizes_reach_the_largest_batch(max_rows: int) -> None:
    sizes = batch_buckets(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1 and sizes[-1] == max_rows
    for rows in range(1, max_rows + 1):
        size = bucket_of(rows, sizes)
        assert rows <= size <= max(2 * rows, rows + 31)


@pytest.mark.parametrize("rank,bucket", [(1, 16), (16, 16), (17, 32), (64, 64), (200, 256)])
def test_rank_buckets(rank: int, bucket: int) -> None:
    assert bucket_of(rank, RANK_BUCKETS) == bucket


@pytest.mark.parametrize("running,budget,rows", [(64, 8192, 512), (700, 8192, 700), (64, 256, 256)])
def test_rows_that_have_graphs(running: int, budget: int, rows: int) -> None:
    config = EngineConfig(max_running_requests=running, max_batched_tokens=budget)
    assert max_graph_rows(config) == rows
