"""Tiles of segments: every row of an adapter once, none of the base model."""

import pytest
import torch

from kernels.lora_segments import LoraTiles, choose_block_rows, plan_tiles


@pytest.mark.parametrize("block_rows", [1, 16, 64])
@pytest.mark.parametrize(
    "counts,slots",
    [
        ([1], [0]),
        ([5], [-1]),
        ([3, 0, 40, 16, 17], [-1, 2, 0, 7, 3]),
        ([64, 1, 129], [4, -1, 1]),
    ],
)
def test_tiles_cover_the_rows_of_adapters_once(
    counts: list[int], slots: list[int], block_rows: int
) -> None:
    bounds = [sum(counts[:i]) for i in range(len(counts) + 1)]
    row_slots = [slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)]
    covered = []
    for slot, start, end in plan_tiles(bounds, slots, block_rows):
        assert 0 < end - start <= block_rows
        assert {row_slots[row] for row in range(start, end)} == {slot}
        covered += range(start, end)
    assert covered == [row for row, slot in enumerate(row_slots) if slot >= 0]


def test_tensors_of_tiles_are_padded_with_unused_ones() -> None:
    tiles = LoraTiles.of([(3, 0, 16), (0, 17, 18)], 16, num_tiles=4)
    assert tiles.slots.tolist() == [3, 0, -1, -1]
    assert tiles.row_starts.tolist() == [0, 17, 0, 0]
    assert tiles.row_ends.tolist() == [16, 18, 0, 0]
    assert {tiles.slots.dtype, tiles.row_starts.dtype, tiles.row_ends.dtype} == {torch.int32}
    assert LoraTiles.of([], 16).slots.shape == (0,)


def test_prompts_have_larger_tiles_than_decodes() -> None:
    assert choose_block_rows(64, 64) == choose_block_rows(64, 20) == 16
    assert choose_block_rows(8192, 1) == choose_block_rows(8192, 60) == 64
    assert choose_block_rows(0, 0) == 16
