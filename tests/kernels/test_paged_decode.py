"""Paged decode attention against dense fp64 math, however the context is split into items."""

import inspect

import pytest
import torch

from kernels import torch_ops
from kernels.attention_launch import AttentionLaunch
from kernels.attention_plan import plan_decode
from kernels.paged_decode import paged_decode
from tests.kernels.cases import (
    DEVICE,
    DTYPES,
    SHAPE_DTYPES,
    PagedCase,
    assert_close,
    attention64,
    bits,
    make_paged_case,
)
from tests.on_gpu import gpu_test

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SM_SCALE = 0.2
MIXED = [1, 130, 7, 64, 300]


def _queries(case: PagedCase, group: int, dtype: torch.dtype) -> torch.Tensor:
    num_kv_heads, head_dim = case.kv_cache.shape[4:]
    shape = len(case.context_lens), num_kv_heads * group, head_dim
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _check(
    case: PagedCase,
    group: int,
    dtype: torch.dtype,
    max_items: int | None = None,
    min_chunk_tokens: int = 64,
    launch: AttentionLaunch | None = None,
) -> None:
    """Compare all rows but those that pad the batch; `max_items` None lets the op plan."""
    lens = case.context_lens.tolist()
    q = _queries(case, group, dtype)
    before = bits(case.kv_cache)
    on_device = case.to(DEVICE)
    plan = max_items and plan_decode(lens, max_items, min_chunk_tokens).to(DEVICE)
    out = paged_decode(
        q.to(DEVICE),
        on_device.kv_cache,
        case.layer,
        on_device.block_tables,
        on_device.context_lens,
        SM_SCALE,
        plan,
        launch=launch,
    )
    assert out.dtype == dtype
    for row, length in enumerate(lens):
        if length:
            expected = attention64(q[row : row + 1], case, row, SM_SCALE)
            assert_close(out[row : row + 1], expected, dtype)
    assert torch.equal(bits(on_device.kv_cache).cpu(), before)


def test_signature_is_the_twins() -> None:
    twin = inspect.signature(torch_ops.paged_decode).parameters
    ours = inspect.signature(paged_decode).parameters
    positional = {n: p for n, p in ours.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY}
    assert positional == twin


@pytest.mark.parametrize("dtype", SHAPE_DTYPES)
@pytest.mark.parametrize("page_tokens", [8, 16, 64])
@pytest.mark.parametrize("num_kv_heads,group", [(1, 1), (1, 8), (2, 2), (3, 5), (8, 1)])
def test_heads_and_pages(
    num_kv_heads: int, group: int, page_tokens: int, dtype: torch.dtype
) -> None:
    case = make_paged_case(
        [1, 70, 8], num_kv_heads=num_kv_heads, page_tokens=page_tokens, dtype=dtype, extra_columns=2
    )
    _check(case, group, dtype)


@pytest.mark.parametrize("dtype", SHAPE_DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    case = make_paged_case([129, 5], num_kv_heads=1, head_dim=head_dim, dtype=dtype)
    _check(case, 2, dtype, max_items=6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_items", [5, 6, 8, 40])
def test_rows_split_into_items(max_items: int, dtype: torch.dtype) -> None:
    case = make_paged_case(MIXED, num_kv_heads=1, dtype=dtype)
    _check(case, 3, dtype, max_items)


@pytest.mark.parametrize("loudest_part", [0, 18])
def test_more_parts_than_are_combined_at_a_time(loudest_part: int) -> None:
    case = make_paged_case([64 * 19 + 1, 2], num_kv_heads=1, page_tokens=64)
    tokens = slice(64 * loudest_part, 64 * loudest_part + 64)
    case.keys[0][tokens] *= 4
    case.kv_cache[case.block_tables[0, loudest_part], case.layer, 0] *= 4
    _check(case, 1, torch.float32, max_items=30)


@pytest.mark.parametrize("context_lens", [[0], [0, 70, 0], [200, 0]])
def test_rows_that_pad_the_batch(context_lens: list[int]) -> None:
    case = make_paged_case(context_lens, num_kv_heads=1)
    _check(case, 2, torch.float32, max_items=len(context_lens) + 3)
    _check(case, 2, torch.float32, max_items=len(context_lens))


def test_large_scores_of_one_token() -> None:
    case = make_paged_case([140], num_kv_heads=1)
    case.keys[0] *= 100
    # Page 0, the padding, keeps its NaNs.
    case.kv_cache[case.block_tables[0].long(), case.layer, 0] *= 100
    _check(case, 1, torch.float32, max_items=3)


def test_no_rows() -> None:
    case = make_paged_case([5]).to(DEVICE)
    q = torch.zeros(0, 4, 16, device=DEVICE)
    args = case.kv_cache, case.layer, case.block_tables[:0], case.context_lens[:0], SM_SCALE
    assert paged_decode(q, *args).shape == q.shape


@pytest.mark.parametrize("block_tokens", [16, 32, 128])
def test_launch_parameters_do_not_change_the_result(block_tokens: int) -> None:
    case = make_paged_case([150, 40], num_kv_heads=1, page_tokens=8)
    _check(case, 2, torch.float32, max_items=4, launch=AttentionLaunch(block_tokens, 4, 2))


@pytest.mark.parametrize("dtype", SHAPE_DTYPES)
def test_strided_queries_and_equal_bits_twice(dtype: torch.dtype) -> None:
    case = make_paged_case([33, 150], dtype=dtype).to(DEVICE)
    fused = torch.randn(2, 3 * 64, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    q = fused[:, 64:128].view(2, 4, 16)
    plan = plan_decode([33, 150], 5, 64).to(DEVICE)
    args = case.kv_cache, case.layer, case.block_tables, case.context_lens, SM_SCALE, plan
    out = paged_decode(q, *args)
    assert torch.equal(out, paged_decode(q, *args))
    assert torch.equal(out, paged_decode(q.contiguous(), *args))


@gpu_test
def test_graph_replay_of_other_lengths_equals_eager() -> None:
    dtype, rows, max_items = torch.bfloat16, 6, 40
    batches = ([900, 1, 64, 0, 257, 2100], [1, 1, 1, 1, 1, 1], [0, 4000, 0, 33, 700, 16])
    cases = [
        make_paged_case(lens, head_dim=128, dtype=dtype, seed=seed).to(DEVICE)
        for seed, lens in enumerate(batches)
    ]
    num_pages = max(len(case.kv_cache) for case in cases)
    kv_cache = torch.zeros(num_pages, *cases[0].kv_cache.shape[1:], dtype=dtype, device=DEVICE)
    width = max(case.block_tables.shape[1] for case in cases)
    block_tables = torch.zeros(rows, width, dtype=torch.int32, device=DEVICE)
    context_lens = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    q = torch.zeros(rows, 8, 128, dtype=dtype, device=DEVICE)
    plan = plan_decode([0] * rows, max_items).to(DEVICE)

    def attend() -> torch.Tensor:
        layer = cases[0].layer
        return paged_decode(q, kv_cache, layer, block_tables, context_lens, SM_SCALE, plan)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = attend()
    for lens, case in zip(batches, cases, strict=True):
        kv_cache[: len(case.kv_cache)] = case.kv_cache
        block_tables.zero_()
        block_tables[:, : case.block_tables.shape[1]] = case.block_tables
        context_lens.copy_(case.context_lens)
        q.copy_(_queries(case, 4, dtype))
        for name, values in vars(plan_decode(lens, max_items)).items():
            getattr(plan, name).copy_(values)
        graph.replay()
        eager = attend()
        used = [row for row, length in enumerate(lens) if length]
        assert torch.equal(replayed[used], eager[used])
        expected = torch.cat(
            [attention64(q[row : row + 1].cpu(), case, row, SM_SCALE) for row in used]
        )
        assert_close(eager[used], expected, dtype)
