"""Plans cover every token of every row once, within the room they are given."""

import random
import time

import pytest
import torch

from kernels.attention_plan import (
    CHUNK_STEP,
    DecodePlan,
    max_decode_items,
    plan_decode,
    plan_prefill,
    prefill_block_rows,
)

LENGTHS = [
    [1],
    [0],
    [0, 0, 5],
    [64, 65, 128, 1],
    [16384],
    [300] * 7,
    [4000, 0, 3, 128, 129, 0],
    [random.Random(0).randint(1, 2048) for _ in range(64)],
]


def _items(plan: DecodePlan) -> list[tuple[int, int]]:
    pairs = list(zip(plan.item_rows.tolist(), plan.item_starts.tolist(), strict=True))
    used = [pair for pair in pairs if pair[0] >= 0]
    assert pairs[: len(used)] == used, "unused items must be the last"
    return used


@pytest.mark.parametrize("context_lens", LENGTHS)
@pytest.mark.parametrize("spare", [0, 1, 9, 200])
@pytest.mark.parametrize("min_chunk_tokens", [1, 128, 256])
def test_decode_items_cover_each_row_once(
    context_lens: list[int], spare: int, min_chunk_tokens: int
) -> None:
    plan = plan_decode(context_lens, len(context_lens) + spare, min_chunk_tokens)
    chunk = int(plan.chunk_tokens)
    assert chunk % CHUNK_STEP == 0
    assert chunk >= min_chunk_tokens
    items = _items(plan)
    covered = {
        (row, token)
        for row, start in items
        for token in range(start, min(start + chunk, context_lens[row]))
    }
    assert len(items) == sum(-(-length // chunk) for length in context_lens)
    assert len(covered) == sum(context_lens)
    # Each part of a row has its own place in the workspace, in the order of its tokens.
    bounds = plan.row_items.tolist()
    places = sorted(bounds[row] + start // chunk for row, start in items)
    assert places == list(range(len(items)))
    counts = [bounds[row + 1] - bounds[row] for row in range(len(context_lens))]
    assert counts == [-(-length // chunk) for length in context_lens]


@pytest.mark.parametrize("context_lens", LENGTHS)
@pytest.mark.parametrize("spare", [0, 9, 200])
def test_decode_chunks_make_no_more_parts_than_fill_the_gpu(
    context_lens: list[int], spare: int
) -> None:
    max_items = len(context_lens) + spare
    chunk = int(plan_decode(context_lens, max_items, 128).chunk_tokens)
    assert sum(-(-length // chunk) for length in context_lens) <= max_items
    if spare:
        # The next finer chunk would cut the tokens into more pieces than there are spare items.
        assert chunk == 128 or (chunk - CHUNK_STEP) * spare < sum(context_lens)
    else:
        assert chunk >= max(context_lens, default=0)


def test_decode_items_are_in_order_of_falling_length() -> None:
    context_lens = [700, 90, 2000, 512, 1]
    plan = plan_decode(context_lens, 12)
    chunk = int(plan.chunk_tokens)
    lens = [min(chunk, context_lens[row] - start) for row, start in _items(plan)]
    assert lens == sorted(lens, reverse=True)


@pytest.mark.parametrize("num_kv_heads", [1, 8, 32])
def test_a_single_long_row_fills_a_gpu(num_kv_heads: int) -> None:
    plan = plan_decode([16384], max_decode_items(1, num_kv_heads))
    num_programs = len(_items(plan)) * num_kv_heads
    # With one KV head, items of the least size are all that there is to share.
    assert num_programs >= min(4 * 132, 16384 // 128)


def test_decode_plans_of_one_batch_size_have_the_same_shapes() -> None:
    first, second = plan_decode([1, 2, 3], 20), plan_decode([9000, 0, 70], 20)
    for name in ("item_rows", "item_starts", "row_items", "chunk_tokens"):
        assert getattr(first, name).dtype == getattr(second, name).dtype == torch.int32
        assert getattr(first, name).shape == getattr(second, name).shape


def test_planning_a_large_batch_is_quick(one_thread: None) -> None:
    lengths = [random.Random(1).randint(1, 4096) for _ in range(256)]
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        plan_decode(lengths, max_decode_items(256, 32))
        seconds.append(time.perf_counter() - started)
    # A quarter of a millisecond on an idle core.
    assert min(seconds) < 2e-3


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("block_rows", [16, 64])
@pytest.mark.parametrize("chunk_lens", [[], [1], [0, 7], [70, 1, 129]])
def test_prefill_tiles_cover_each_packed_row_once(
    chunk_lens: list[int], block_rows: int, group: int
) -> None:
    context_lens = [chunk_len + 50 * p for p, chunk_len in enumerate(chunk_lens)]
    plan = plan_prefill(chunk_lens, context_lens, group, block_rows)
    assert plan.tile_requests.dtype == plan.tile_starts.dtype == torch.int32
    tiles = list(zip(plan.tile_requests.tolist(), plan.tile_starts.tolist(), strict=True))
    assert sorted(tiles) == [
        (p, start)
        for p, chunk_len in enumerate(chunk_lens)
        for start in range(0, chunk_len * group, block_rows)
    ]


def test_prefill_tiles_that_see_most_come_first() -> None:
    plan = plan_prefill([64, 8], [64, 500], group=2, block_rows=32)
    assert plan.tile_requests.tolist() == [1, 0, 0, 0, 0]
    assert plan.tile_starts.tolist() == [0, 96, 64, 32, 0]


def test_prefill_tiles_shrink_until_they_fill_a_gpu() -> None:
    assert prefill_block_rows([512] * 16, 32, 32, max_block_rows=128) == 128
    assert prefill_block_rows([256], 32, 32, max_block_rows=128) == 64
    assert prefill_block_rows([256], 32, 8, max_block_rows=128) == 64
    assert prefill_block_rows([3], 4, 4, max_block_rows=128) == 32
