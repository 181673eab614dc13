"""Tiles of segments: every row once."""

import pytest
import torch

from kernels.lora_segments import LoraTiles, Tile, choose_block_rows, plan_tiles
from kernels.row_alignment import row_elems


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
def test_tiles_cover_every_row_once(counts: list[int], slots: list[int], block_rows: int) -> None:
    bounds = [sum(counts[:i]) for i in range(len(counts) + 1)]
    row_slots = [slot for slot, count in zip(slots, counts, strict=True) for _ in range(count)]
    tiles = plan_tiles(bounds, slots, block_rows)
    # What a CUDA graph of as many rows has room for.
    assert len(tiles) <= len(row_slots)
    covered = []
    for index, tile in enumerate(tiles):
        slot, start, end, share, num_shares = tile
        assert 0 < end - start <= block_rows
        assert {row_slots[row] for row in range(start, end)} == {slot}
        assert tiles[index - share : index - share + num_shares] == [
            tile._replace(share=other) for other in range(num_shares)
        ]
        if share == 0:
            covered += range(start, end)
    assert covered == list(range(len(row_slots)))


def test_tiles_of_many_rows_are_shared_by_programs() -> None:
    shares = [tile.num_shares for tile in plan_tiles([0, 1, 49, 50], [3, 5, 0], 16)]
    assert shares == [1, *[8] * 24, 1]
    # Long prompts have programs enough; rows of decodes beside a prompt do not make it one.
    assert {tile.num_shares for tile in plan_tiles([0, 8192], [0], 64)} == {1}
    decodes = list(range(60))
    tiles = plan_tiles([*decodes, 60, 60 + 64 * 8], [*decodes, 60], 64)
    assert [tile.num_shares for tile in tiles] == [1] * 60 + [8] * 64


@pytest.mark.parametrize("block_rows,num_rows", [(16, 47), (64, 15)])
def test_short_runs_are_tiles_of_one(block_rows: int, num_rows: int) -> None:
    rows = [Tile(3, row, row + 1) for row in range(num_rows)]
    assert plan_tiles([0, num_rows], [3], block_rows) == rows
    end = min(block_rows, num_rows + 1)
    assert plan_tiles([0, num_rows + 1], [3], block_rows)[0] == Tile(3, 0, end, 0, 8)


@pytest.mark.parametrize("block_rows", [16, 64])
def test_little_that_is_left_of_a_run_is_tiles_of_one(block_rows: int) -> None:
    rows = 64 + block_rows
    last = [Tile(3, rows, rows + 1), Tile(3, rows + 1, rows + 2)]
    assert plan_tiles([0, rows + 2], [3], block_rows)[-2:] == last


def test_tensors_of_tiles_are_padded_with_unused_ones() -> None:
    tiles = LoraTiles.of([Tile(3, 0, 16, 1, 8), Tile(0, 17, 18)], 16, num_tiles=4)
    assert tiles.slots.tolist() == [3, 0, -1, -1]
    assert tiles.row_starts.tolist() == [0, 17, 0, 0]
    assert tiles.row_ends.tolist() == [16, 18, 0, 0]
    assert tiles.shares.tolist() == [1, 0, 0, 0]
    assert tiles.num_shares.tolist() == [8, 1, 1, 1]
    assert {tiles.slots.dtype, tiles.row_starts.dtype, tiles.row_ends.dtype} == {torch.int32}
    assert LoraTiles.of([], 16).slots.shape == (0,)


def test_prompts_have_larger_tiles_than_decodes() -> None:
    assert choose_block_rows(64, 64) == choose_block_rows(64, 20) == 16
    assert choose_block_rows(8192, 1) == choose_block_rows(8192, 60) == 64
    assert choose_block_rows(0, 0) == 16


def test_row_elems() -> None:
    assert [row_elems(n) for n in (1, 63, 64, 65, 128)] == [64, 64, 64, 128, 128]
