"""Paged prefill attention against dense fp64 math, for whole prompts and for chunks of them."""

import inspect

import pytest
import torch

from kernels import torch_ops
from kernels.attention_launch import AttentionLaunch
from kernels.attention_plan import plan_prefill
from kernels.paged_prefill import paged_prefill
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

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SM_SCALE = 0.2
# (context length, rows of it that are computed in this step)
Chunks = list[tuple[int, int]]


def _bounds(chunks: Chunks) -> list[int]:
    return [sum(rows for _, rows in chunks[:p]) for p in range(len(chunks) + 1)]


def _case(chunks: Chunks, dtype: torch.dtype, **shape: int) -> PagedCase:
    return make_paged_case([length for length, _ in chunks], dtype=dtype, extra_columns=1, **shape)


def _check(
    chunks: Chunks,
    group: int,
    dtype: torch.dtype = torch.float32,
    block_rows: int | None = None,
    launch: AttentionLaunch | None = None,
    **shape: int,
) -> None:
    """Compare every row; without `block_rows` the op plans."""
    case = _case(chunks, dtype, **shape)
    bounds = _bounds(chunks)
    num_kv_heads, head_dim = case.kv_cache.shape[4:]
    q = torch.randn(
        bounds[-1], num_kv_heads * group, head_dim, generator=torch.Generator().manual_seed(1)
    ).to(dtype)
    plan = None
    if block_rows:
        lengths, rows = zip(*chunks, strict=True)
        plan = plan_prefill(rows, lengths, group, block_rows).to(DEVICE)
    before = bits(case.kv_cache)
    on_device = case.to(DEVICE)
    out = paged_prefill(
        q.to(DEVICE),
        on_device.kv_cache,
        case.layer,
        torch.tensor(bounds, dtype=torch.int32, device=DEVICE),
        on_device.block_tables,
        on_device.context_lens,
        SM_SCALE,
        plan,
        launch=launch,
    )
    assert out.dtype == dtype
    expected = torch.cat(
        [
            attention64(q[bounds[p] : bounds[p + 1]], case, p, SM_SCALE)
            for p in range(len(chunks))
            if chunks[p][1]
        ]
    )
    assert_close(out, expected, dtype)
    assert torch.equal(bits(on_device.kv_cache).cpu(), before)


def test_signature_is_the_twins() -> None:
    twin = inspect.signature(torch_ops.paged_prefill).parameters
    ours = inspect.signature(paged_prefill).parameters
    positional = {n: p for n, p in ours.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY}
    assert positional == twin


@pytest.mark.parametrize("dtype", SHAPE_DTYPES)
@pytest.mark.parametrize("page_tokens", [8, 16, 64])
@pytest.mark.parametrize("num_kv_heads,group", [(1, 1), (1, 8), (2, 2), (3, 5), (8, 1)])
def test_heads_and_pages(
    num_kv_heads: int, group: int, page_tokens: int, dtype: torch.dtype
) -> None:
    chunks = [(40, 13), (7, 7), (66, 1)]
    _check(chunks, group, dtype, num_kv_heads=num_kv_heads, page_tokens=page_tokens)


@pytest.mark.parametrize("dtype", SHAPE_DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    _check([(130, 40), (3, 3)], 2, dtype, num_kv_heads=1, head_dim=head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "chunks",
    [
        [(1, 1)],
        [(200, 200)],
        # A chunk of one token, one that ends with a page, one of no rows, a long prefix.
        [(64, 1), (128, 64), (9, 0), (257, 3)],
    ],
)
def test_chunks(chunks: Chunks, dtype: torch.dtype) -> None:
    _check(chunks, 3, dtype, num_kv_heads=1)


@pytest.mark.parametrize("block_rows", [16, 32, 64, 128])
@pytest.mark.parametrize("block_tokens", [16, 64])
def test_tile_sizes(block_rows: int, block_tokens: int) -> None:
    launch = AttentionLaunch(block_tokens, num_warps=4, num_stages=1)
    _check([(95, 64), (33, 17)], 3, torch.float32, block_rows, launch, num_kv_heads=1)


def test_no_rows() -> None:
    case = _case([(5, 0)], torch.float32).to(DEVICE)
    q = torch.zeros(0, 4, 16, device=DEVICE)
    indptr = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    args = case.kv_cache, case.layer, indptr, case.block_tables, case.context_lens, SM_SCALE
    assert paged_prefill(q, *args).shape == q.shape


@pytest.mark.parametrize("dtype", SHAPE_DTYPES)
def test_strided_queries_and_equal_bits_twice(dtype: torch.dtype) -> None:
    case = _case([(50, 20), (6, 6)], dtype).to(DEVICE)
    fused = torch.randn(26, 3 * 64, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    q = fused[:, 64:128].view(26, 4, 16)
    indptr = torch.tensor([0, 20, 26], dtype=torch.int32, device=DEVICE)
    args = case.kv_cache, case.layer, indptr, case.block_tables, case.context_lens, SM_SCALE
    out = paged_prefill(q, *args)
    assert torch.equal(out, paged_prefill(q, *args))
    assert torch.equal(out, paged_prefill(q.contiguous(), *args))
