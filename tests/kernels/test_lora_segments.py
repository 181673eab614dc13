"""Tiles of segments: every row of an adapter once, none of the base model."""

import pytest

from kernels.lora_segments import plan_tiles


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
