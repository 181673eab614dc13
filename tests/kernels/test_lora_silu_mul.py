"""SiLU-mul with deltas, the twin's and the kernel's, against dense fp64 math."""

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch

from kernels import torch_ops, triton_ops
from kernels.lora_segments import MIN_DECODE_RUN, TILE_FIELDS
from tests.kernels import naive
from tests.kernels.cases import (
    DEVICE,
    DTYPES,
    SHAPE_DTYPES,
    TWIN_DTYPES,
    LoraCase,
    assert_close,
    bits,
    make_lora_case,
)
from tests.kernels.elementwise import assert_few_bits_differ, randn
from tests.on_gpu import gpu_test

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Rank 0 is absent: slots 5 and 6 lack a module each.
RANKS = [[r, r] for r in (1, 8, 16, 33, 200)] + [[0, 8], [5, 0], [4, 64]]
# Runs of a row, of a few and of whole tiles, with rows of the base model between.
RUNS = [
    (-1, 2),
    (0, 1),
    (5, 3),
    (6, 2),
    (7, 1),
    (2, 50),
    (-1, 17),
    (3, 1),
    (4, 2),
    (1, 19),
    (-1, 1),
]

each_implementation = pytest.mark.parametrize(
    "ops,block_rows,dtype",
    [pytest.param(torch_ops, None, dtype, id=f"twin-{dtype}") for dtype in TWIN_DTYPES]
    + [
        pytest.param(triton_ops, block_rows, dtype, id=f"triton{block_rows}-{dtype}")
        for block_rows in (16, 64)
        for dtype in SHAPE_DTYPES
    ],
)


def _run(ops: ModuleType, case: LoraCase, x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    device = DEVICE if ops is triton_ops else torch.device("cpu")
    on_device = case.to(device)
    args = on_device.pool, 1, (0, 1)
    v = ops.lora_shrink(x.to(device), *args, on_device.segments)
    return ops.lora_silu_mul(gate_up.clone().to(device), v, *args, on_device.segments).cpu()


def _check(
    ops: ModuleType,
    dtype: torch.dtype,
    block_rows: int | None,
    runs: Sequence[tuple[int, int]],
    width: int,
    page_elems: int = 1024,
) -> None:
    """Rows of adapters against dense math; rows of the base model have the bits of `silu_mul`."""
    dims = [(100, width)] * 2
    case = make_lora_case(
        runs, RANKS, dims, dtype=dtype, block_rows=block_rows, page_elems=page_elems
    )
    rows = len(case.row_slots)
    x = randn(rows, 100, dtype=dtype).cpu()
    gate_up = randn(rows, 2 * width, dtype=dtype, seed=2).cpu()
    # Adding zero to a negative zero changes its bits.
    gate_up[:, ::3] = -0.0
    y = _run(ops, case, x, gate_up)
    assert y.dtype == dtype
    deltas = torch.cat([case.deltas(x, 1, module, width) for module in range(2)], 1)
    expected = naive.lora_silu_mul(gate_up, deltas)
    # Outputs reach ten, and their inputs were rounded before.
    assert_close(y / 8, expected / 8, dtype)
    base = [row for row, slot in enumerate(case.row_slots) if slot < 0]
    plain = ops.silu_mul(gate_up.to(DEVICE if ops is triton_ops else "cpu")).cpu()
    assert torch.equal(bits(y[base]), bits(plain[base]))


@each_implementation
@pytest.mark.parametrize("page_elems", [64, 1 << 16])
def test_mixed_ranks_absent_modules_and_base_rows(
    page_elems: int, ops: ModuleType, block_rows: int | None, dtype: torch.dtype
) -> None:
    runs = RUNS
    if block_rows == 16:
        # Of rows that large tiles take together, some are enough.
        runs = [(slot, count if count >= MIN_DECODE_RUN else min(count, 3)) for slot, count in RUNS]
    _check(ops, dtype, block_rows, runs, 70, page_elems)


@each_implementation
def test_several_blocks_of_columns(
    ops: ModuleType, block_rows: int | None, dtype: torch.dtype
) -> None:
    _check(ops, dtype, block_rows, [(2, 1), (1, 17), (-1, 1)], 1100, 1 << 16)


@pytest.mark.parametrize("dtype", SHAPE_DTYPES)
def test_unused_tiles_and_rows_that_pad(dtype: torch.dtype) -> None:
    case = make_lora_case([(1, 2), (-1, 1)], RANKS, [(100, 70)] * 2, dtype=dtype, block_rows=16)
    x, gate_up = randn(5, 100, dtype=dtype).cpu(), randn(5, 140, dtype=dtype).cpu()
    y = _run(triton_ops, case, x, gate_up)
    assert y[:3].isfinite().all()
    assert y[3:].isnan().all(), "rows of no tile were written"


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_kernel_rounds_where_the_twin_does(dtype: torch.dtype) -> None:
    case = make_lora_case(RUNS, RANKS, [(100, 260)] * 2, dtype=dtype, block_rows=16)
    rows = len(case.row_slots)
    x, gate_up = randn(rows, 100, dtype=dtype).cpu(), randn(rows, 520, dtype=dtype).cpu()
    ours, twin = (_run(ops, case, x, gate_up) for ops in (triton_ops, torch_ops))
    assert_few_bits_differ(ours, twin)


@gpu_test
def test_a_replayed_graph_equals_eager() -> None:
    """One graph serves batches of any composition: only the contents of its tensors change."""
    dtype, rows = torch.bfloat16, 64
    # A run of whole tiles has an entry for every other row.
    batches = [([(2, rows)], 32), ([(slot, 8) for slot in range(8)], 0), ([(-1, rows)], 32)]
    cases = [
        make_lora_case(
            runs,
            RANKS,
            [(100, 1100)] * 2,
            dtype=dtype,
            block_rows=16,
            max_rank=256,
            unused_tiles=unused_tiles,
        )
        for runs, unused_tiles in batches
    ]
    case = cases[0].to(DEVICE)
    segments = case.segments
    assert segments.tiles is not None
    x = randn(rows, 100, dtype=dtype).to(DEVICE)
    gate_up = randn(rows, 2200, dtype=dtype).to(DEVICE)

    def run() -> torch.Tensor:
        v = triton_ops.lora_shrink(x, case.pool, 0, (0, 1), segments)
        return triton_ops.lora_silu_mul(gate_up, v, case.pool, 0, (0, 1), segments)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    results = []
    for batch in cases:
        for name in TILE_FIELDS:
            getattr(segments.tiles, name).copy_(getattr(batch.segments.tiles, name))
        graph.replay()
        results.append(y.clone())
        assert torch.equal(bits(results[-1]), bits(run()))
    assert not torch.equal(results[0], results[1])
    assert torch.equal(bits(results[2]), bits(triton_ops.silu_mul(gate_up)))
