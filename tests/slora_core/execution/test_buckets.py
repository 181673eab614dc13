"""Batch sizes and ranks that steps are padded to."""

from pathlib import Path

import pytest

from kernels.launch_configs import ShrinkLaunch, shrink_launch
from kernels.lora_segments import choose_block_rows
from slora_core.config import EngineConfig
from slora_core.execution.buckets import (
    RANK_BUCKETS,
    LoraShape,
    batch_buckets,
    bucket_of,
    max_graph_rows,
    module_buckets,
    prompt_batch_buckets,
    warm_up_sizes,
)
from slora_core.models.registry import load_model_config
from tests.factories import make_model


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


@pytest.mark.parametrize("family,num_attention,num_all", [("llama", 4, 7), ("phi3", 2, 4)])
def test_module_buckets(tmp_path: Path, family: str, num_attention: int, num_all: int) -> None:
    attention, everything = frozenset(range(num_attention)), frozenset(range(num_all))
    buckets = module_buckets(load_model_config(make_model(tmp_path, family)))
    assert buckets == (attention, everything)
    assert LoraShape(20, frozenset({0, 1})).graph_bucket(buckets) == LoraShape(32, attention)
    mixed = LoraShape(16, frozenset({0, num_all - 1}))
    assert mixed.graph_bucket(buckets) == LoraShape(16, everything)


@pytest.mark.parametrize(
    "running,budget,rows", [(64, 8192, 1024), (1200, 8192, 1200), (64, 256, 256)]
)
def test_rows_that_have_graphs(running: int, budget: int, rows: int) -> None:
    config = EngineConfig(max_running_requests=running, max_batched_tokens=budget)
    assert max_graph_rows(config) == rows


def _launches(num_rows: int, num_runs: int = 1) -> set[tuple[int, int, int, ShrinkLaunch]]:
    """Of the shrinks of a step with prompts, of so many rows in runs of one adapter."""
    block_rows = choose_block_rows(num_rows, num_runs)
    shapes = [(3, 4096), (1, 4096), (2, 4096), (1, 11008)]
    return {
        (block_rows, *shape, shrink_launch(num_rows, block_rows, shape[0], rank, shape[1]))
        for shape in shapes
        for rank in RANK_BUCKETS
    }


@pytest.mark.parametrize("max_tokens", [16, 100, 512, 2000, 2048, 4096, 5000, 8192, 16384])
def test_every_launch_of_prompts_is_warmed_up(max_tokens: int) -> None:
    warm = set().union(*(_launches(size) for size in warm_up_sizes(max_tokens)))
    for num_runs in (1, 3, 40):
        for num_rows in range(num_runs, max_tokens + 1, 1 if max_tokens <= 2048 else 37):
            missing = _launches(num_rows, num_runs) - warm
            assert not missing, f"{num_rows} rows in {num_runs} runs: {missing}"
