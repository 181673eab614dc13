"""The LoRA ops, the torch twins and the Triton kernels, against dense fp64 math."""

from dataclasses import replace

import pytest
import torch

from kernels.launch_configs import ExpandLaunch, ShrinkLaunch
from kernels.lora_expand import lora_expand
from kernels.lora_segments import TILE_FIELDS, LoraSegments, LoraTiles, Tile
from kernels.lora_shrink import lora_shrink
from tests.kernels.cases import DEVICE, SHAPE_DTYPES, LoraCase, bits, make_lora_case
from tests.kernels.lora_checks import (
    DIMS,
    RANKS,
    LoraOps,
    check_case,
    check_lora,
    each_implementation,
    each_implementation_and_dtype,
    randn,
    triton_ops,
)
from tests.on_gpu import gpu_test
from tests.popularity import PATTERNS, draw_adapters

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_dtype = pytest.mark.parametrize("dtype", SHAPE_DTYPES)

each_block_rows = pytest.mark.parametrize("block_rows", [16, 64])

# Segments of no row, one row and more, with rows of the base model before, between and after.
MIXED_RUNS = [
    (-1, 2),
    (3, 0),
    (0, 1),
    (8, 3),
    (7, 2),
    (-1, 0),
    (10, 51),
    (1, 1),
    (9, 2),
    (5, 7),
    (-1, 1),
]
MODULES = (0, 1, 2)
OUT_OFFSETS = (0, 70, 103, 231)


@each_implementation
@pytest.mark.parametrize("page_elems", [64, 1 << 18])
def test_mixed_ranks_and_empty_segments(page_elems: int, ops: LoraOps, dtype: torch.dtype) -> None:
    check_lora(ops, dtype, MIXED_RUNS, page_elems=page_elems, layers=(1,))


@each_implementation_and_dtype
def test_pages_of_a_size_that_is_no_power_of_two(ops: LoraOps, dtype: torch.dtype) -> None:
    check_lora(ops, dtype, MIXED_RUNS, page_elems=64 * 67, layers=(1,))


@each_implementation
@pytest.mark.parametrize("pattern", PATTERNS)
def test_popularity(pattern: str, ops: LoraOps, dtype: torch.dtype) -> None:
    # Row i draws a slot, or the base model; rows are ordered by slot as in a batch.
    ranks = [[8, 0, 8], [16, 16, 16], [1, 33, 3], [64, 8, 8], [5, 5, 5]]
    slots = sorted(slot - 1 for slot in draw_adapters(pattern, 33, len(ranks) + 1, seed=1))
    if pattern == "identical":
        slots = [2] * 33
    runs = [(slot, slots.count(slot)) for slot in sorted(set(slots))]
    check_lora(ops, dtype, runs, ranks=ranks, layers=(0,))


@each_implementation
@pytest.mark.parametrize("slot", range(len(RANKS)))
def test_single_row(slot: int, ops: LoraOps, dtype: torch.dtype) -> None:
    check_lora(ops, dtype, [(slot, 1)], layers=(0,))


@each_implementation
def test_same_slot_in_two_segments(ops: LoraOps, dtype: torch.dtype) -> None:
    # Decode rows and prefill rows of one adapter are two runs.
    check_lora(ops, dtype, [(2, 2), (4, 1), (2, 3)])


@each_implementation
def test_some_modules(ops: LoraOps, dtype: torch.dtype) -> None:
    check_lora(ops, dtype, [(10, 2), (0, 1)], modules=(1, 2))
    check_lora(ops, dtype, [(10, 1), (9, 3)], modules=(1,))


@each_implementation
def test_rows_of_the_base_model_change_nothing(ops: LoraOps, dtype: torch.dtype) -> None:
    check_lora(ops, dtype, [(-1, 4), (-1, 1)])
    check_lora(ops, dtype, [(3, 0), (-1, 2)])
    check_lora(ops, dtype, [(3, 0), (-1, 2)], unused_tiles=0)


@each_implementation
def test_max_rank_above_every_rank(ops: LoraOps, dtype: torch.dtype) -> None:
    for max_rank in (64, 256):
        check_lora(ops, dtype, [(1, 1), (2, 49), (4, 1)], max_rank=max_rank, layers=(0,))


# (in_features, out_features): several tiles of columns, not all whole, that straddle pages.
WIDE_DIMS = [(550, 1536), (550, 192), (550, 300)]


@each_implementation
@pytest.mark.parametrize("page_elems", [1024, 131072])
def test_wide_modules(page_elems: int, ops: LoraOps, dtype: torch.dtype) -> None:
    ranks = [[8, 8, 8], [33, 0, 16], [3, 64, 1]]
    runs = [(1, 1), (-1, 1), (2, 3 if ops.block_rows == 16 else 18), (0, 1)]
    check_lora(ops, dtype, runs, ranks=ranks, dims=WIDE_DIMS, page_elems=page_elems, layers=(0,))


@each_implementation
def test_long_inputs(ops: LoraOps, dtype: torch.dtype) -> None:
    dims = [(1536, 576)]
    runs = [(0, 49), (1, 1)]
    check_lora(ops, dtype, runs, ranks=[[16], [5]], dims=dims, page_elems=6144)


SHRINK = ShrinkLaunch(
    num_splits=1, block_r=16, row_block_k=128, dot_block_k=64, num_warps=4, num_stages=2
)
EXPAND = ExpandLaunch(block_n=128, dot_block_n=64, row_block_r=16, dot_block_r=16, num_warps=4)


@each_dtype
@each_block_rows
@pytest.mark.parametrize(
    "shrink,expand",
    [
        (SHRINK, EXPAND),
        (replace(SHRINK, num_splits=3, block_r=32), replace(EXPAND, dot_block_n=128)),
        (
            replace(SHRINK, num_splits=16, block_r=64, dot_block_k=128),
            replace(EXPAND, block_n=256, dot_block_n=128, row_block_r=8, dot_block_r=64),
        ),
    ],
    ids=["one_split", "three_splits", "many_splits"],
)
def test_launches(
    shrink: ShrinkLaunch, expand: ExpandLaunch, block_rows: int, dtype: torch.dtype
) -> None:
    ops = triton_ops(block_rows, shrink, expand)
    ranks = [[8, 8], [64, 33]]
    dims = [(576, 300), (576, 128)]
    # Where tiles are small, rows of short runs are programs of their own: few show what all do.
    runs = [(0, 1), (1, 1), (-1, 1), (1, 3 if block_rows == 16 else 20), (0, 2)]
    check_lora(ops, dtype, runs, ranks=ranks, dims=dims, page_elems=6144, layers=(0,))


@each_dtype
@pytest.mark.parametrize("max_rank", [16, 32, 64, 128, 256])
def test_chosen_launches_cover_a_rank_of_their_bucket(max_rank: int, dtype: torch.dtype) -> None:
    for block_rows in (16, 64 if max_rank > 16 else 128):
        check_lora(
            triton_ops(block_rows),
            dtype,
            [(0, 1), (0, 49)],
            ranks=[[max_rank - 1]],
            dims=[(192, 136)],
            max_rank=max_rank,
            layers=(0,),
        )


@each_implementation
def test_repeats_bit_for_bit(ops: LoraOps, dtype: torch.dtype) -> None:
    runs = [(4, 3), (-1, 1), (2, 4), (5, 1)]
    case = make_lora_case(runs, RANKS, DIMS, dtype=dtype, block_rows=ops.block_rows)
    case = case.to(ops.device)
    x = randn(9, 100, dtype=dtype).to(ops.device)
    results = []
    for _ in range(2):
        y = torch.zeros(9, OUT_OFFSETS[-1], dtype=dtype, device=ops.device)
        v = ops.shrink(x, case.pool, 0, MODULES, case.segments)
        ops.expand(y, v, case.pool, 0, MODULES, OUT_OFFSETS, case.segments)
        results.append(bits(y))
    assert torch.equal(*results)
    assert results[0].any()


@gpu_test
@each_block_rows
def test_a_replayed_graph_equals_eager(block_rows: int) -> None:
    """One graph serves batches of any composition: only the contents of its tensors change."""
    dtype, num_rows, num_tiles, max_rank = torch.bfloat16, 40, 40, 64
    batches = [
        [(slot % 6, 1) for slot in range(num_rows)],
        [(5, num_rows)],
        [(-1, num_rows)],
        [(0, 1), (-1, 3), (4, 20), (2, 1), (5, 15)],
    ]
    cases = [
        make_lora_case(runs, RANKS[:6], DIMS, dtype=dtype, block_rows=block_rows, max_rank=max_rank)
        for runs in batches
    ]
    # Seeds are the same, so that the pool and the tables are too.
    case = cases[0].to(DEVICE)
    x = randn(num_rows, 100, dtype=dtype).to(DEVICE)
    base = randn(num_rows, OUT_OFFSETS[-1], dtype=dtype, seed=1).to(DEVICE)

    def run(segments: LoraSegments, y: torch.Tensor) -> torch.Tensor:
        y.copy_(base)
        v = lora_shrink(x, case.pool, 0, MODULES, segments)
        lora_expand(y, v, case.pool, 0, MODULES, OUT_OFFSETS, segments)
        return y

    def padded(batch: LoraCase) -> LoraTiles:
        fields = torch.stack([getattr(batch.segments.tiles, name) for name in TILE_FIELDS], 1)
        used = [Tile(*entry) for entry in fields.tolist() if entry[0] >= 0]
        return LoraTiles.of(used, block_rows, num_tiles, DEVICE)

    eager = [
        bits(run(replace(case.segments, tiles=padded(batch)), torch.empty_like(base)))
        for batch in cases
    ]
    static = replace(case.segments, tiles=padded(cases[2]))
    y = torch.empty_like(base)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(static, y)
    for batch, expected in zip(cases, eager, strict=True):
        tiles = padded(batch)
        for name in TILE_FIELDS:
            getattr(static.tiles, name).copy_(getattr(tiles, name))
        graph.replay()
        assert torch.equal(bits(y), expected)
    assert not torch.equal(eager[0], eager[2])


@gpu_test
@each_block_rows
def test_pages_beyond_32_bits(block_rows: int) -> None:
    """Elements of a pool are more than an int32 counts."""
    dtype, dims = torch.bfloat16, [(576, 300)]
    runs = [(0, 1), (1, 20)]
    case = make_lora_case(runs, [[8], [33]], dims, dtype=dtype, block_rows=block_rows)
    num_pages, num_layers, page_elems = case.pool.shape
    first_page = 2**31 // (num_layers * page_elems)
    pool = torch.empty(first_page + num_pages, num_layers, page_elems, dtype=dtype, device=DEVICE)
    pool[first_page:] = case.pool.to(DEVICE)
    case.segments.page_tables.add_(first_page)
    check_case(triton_ops(block_rows), dtype, replace(case, pool=pool), dims, (0,), (0, 1))
