"""Batch sizes and ranks that steps are padded to."""

import pytest

from kernels.launch_configs import ShrinkLaunch, shrink_launch
from kernels.lora_segments import choose_block_rows, plan_tiles
from slora_core.config import EngineConfig
from slora_core.execution.buckets import (
    RANK_BUCKETS,
    batch_buckets,
    bucket_of,
    max_graph_rows,
    prompt_batch_buckets,
    warm_up_sizes,
)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7, 8, 64, 65, 200, 256, 1000])
def test_batch_sizes_reach_the_largest_batch(max_rows: int) -> None:
    sizes = batch_buckets(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1 and sizes[-1] == max_rows
    for rows in range(1, max_rows + 1):
        size = bucket_of(rows, sizes)
        assert rows <= size <= max(2 * rows, rows + 31)


@pytest.mark.parametrize("max_rows", [1, 16, 24, 64, 100, 512, 700, 1024])
def test_sizes_of_steps_with_prompts_reach_the_largest(max_rows: int) -> None:
    sizes = prompt_batch_buckets(max_rows)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_rows
    for rows in range(1, max_rows + 1):
        size = bucket_of(rows, sizes)
        assert rows <= size <= max(16, 2 * rows)
        assert size < rows + (64 if rows <= 512 else 128)


@pytest.mark.parametrize("rank,bucket", [(1, 16), (16, 16), (17, 32), (64, 64), (200, 256)])
def test_rank_buckets(rank: int, bucket: int) -> None:
    assert bucket_of(rank, RANK_BUCKETS) == bucket


@pytest.mark.parametrize(
    "running,budget,rows", [(64, 8192, 1024), (1200, 8192, 1200), (64, 256, 256)]
)
def test_rows_that_have_graphs(running: int, budget: int, rows: int) -> None:
    config = EngineConfig(max_running_requests=running, max_batched_tokens=budget)
    assert max_graph_rows(config) == rows


def _launches(num_decodes: int, num_tokens: int) -> set[tuple[int, int, int, ShrinkLaunch]]:
    """Of a step's shrinks: that many rows of an adapter each, and a prompt of another."""
    bounds = [*range(num_decodes + 1), num_decodes + num_tokens]
    num_runs = num_decodes + 1
    block_rows = choose_block_rows(bounds[-1], num_runs)
    num_tiles = len(plan_tiles(bounds, list(range(num_runs)), block_rows))
    shapes = [(3, 4096), (1, 4096), (2, 4096), (1, 11008)]
    return {
        (block_rows, *shape, shrink_launch(num_tiles, block_rows, shape[0], rank, shape[1]))
        for shape in shapes
        for rank in RANK_BUCKETS
    }


def test_every_launch_of_prompts_is_warmed_up() -> None:
    warm = set().union(*(_launches(0, size) for size in warm_up_sizes(8192)))
    for num_decodes in (0, 1, 20, 250):
        for num_tokens in range(1, 8192 - num_decodes, 37):
            missing = _launches(num_decodes, num_tokens) - warm
            assert not missing, f"{num_decodes} decodes and {num_tokens} tokens: {missing}"
