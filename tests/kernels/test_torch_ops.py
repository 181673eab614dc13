"""The attention twins against dense fp64 math that knows no pages.

The twins of other ops are tested with their kernels, by the same checks.
"""

import importlib

import pytest
import torch

from kernels import torch_ops
from tests.kernels.cases import assert_close, attention64, bits, make_paged_case

DTYPES = (torch.float32, torch.float16)


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_tokens", [8, 16, 64])
@pytest.mark.parametrize("num_kv_heads,group", [(1, 1), (1, 8), (2, 2), (3, 5), (8, 1)])
@pytest.mark.parametrize("context_lens", [[1], [1, 130, 7, 64], [33, 8, 16]])
def test_paged_decode(
    context_lens: list[int], num_kv_heads: int, group: int, page_tokens: int, dtype: torch.dtype
) -> None:
    case = make_paged_case(
        context_lens,
        num_kv_heads=num_kv_heads,
        page_tokens=page_tokens,
        dtype=dtype,
        extra_columns=2,
    )
    before = bits(case.kv_cache)
    q = _randn(len(context_lens), num_kv_heads * group, 16, dtype=dtype)
    out = torch_ops.paged_decode(
        q, case.kv_cache, case.layer, case.block_tables, case.context_lens, 0.3
    )
    expected = torch.cat(
        [attention64(q[i : i + 1], case, i, 0.3) for i in range(len(context_lens))]
    )
    assert_close(out, expected, dtype)
    assert torch.equal(bits(case.kv_cache), before)


def test_paged_decode_takes_strided_queries() -> None:
    case = make_paged_case([5, 21])
    fused = _randn(2, 3 * 64)
    q = fused[:, 64:128].view(2, 4, 16)
    args = case.kv_cache, case.layer, case.block_tables, case.context_lens, 0.25
    out = torch_ops.paged_decode(q, *args)
    assert torch.equal(out, torch_ops.paged_decode(q.contiguous(), *args))


@pytest.mark.parametrize("context_lens", [[0], [0, 9, 0], [40, 0, 1]])
def test_paged_decode_beside_padding_rows(context_lens: list[int]) -> None:
    case = make_paged_case(context_lens)
    q = _randn(len(context_lens), 4, 16)
    out = torch_ops.paged_decode(
        q, case.kv_cache, case.layer, case.block_tables, case.context_lens, 0.3
    )
    for row, length in enumerate(context_lens):
        if length:
            expected = attention64(q[row : row + 1], case, row, 0.3)
            assert_close(out[row : row + 1], expected, torch.float32)


def test_paged_decode_pads_no_request_far_beyond_its_own_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context_lens = [20] * 31 + [1500]
    case = make_paged_case(context_lens, num_kv_heads=1, page_tokens=8)
    gathered = []

    def gather(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = gather_kv(*args)
        gathered.append(keys.shape[0] * keys.shape[1])
        return keys, values

    # By its path, which of the package is the op.
    module = importlib.import_module("kernels.torch_ops.paged_decode")
    gather_kv = module.gather_kv
    monkeypatch.setattr(module, "gather_kv", gather)
    q = _randn(len(context_lens), 2, 16)
    out = torch_ops.paged_decode(
        q, case.kv_cache, case.layer, case.block_tables, case.context_lens, 0.3
    )
    assert sum(gathered) <= 2 * sum(context_lens)
    assert_close(out[5:6], attention64(q[5:6], case, 5, 0.3), torch.float32)
    assert_close(out[31:], attention64(q[31:], case, 31, 0.3), torch.float32)


# (context length, rows of it that are computed in this step)
CHUNKS = [
    [(1, 1)],
    [(40, 40)],
    [(40, 13), (7, 7), (65, 1), (130, 64)],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_tokens", [8, 16, 64])
@pytest.mark.parametrize("num_kv_heads,group", [(1, 1), (1, 8), (2, 2), (3, 5)])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_paged_prefill(
    chunks: list[tuple[int, int]],
    num_kv_heads: int,
    group: int,
    page_tokens: int,
    dtype: torch.dtype,
) -> None:
    case = make_paged_case(
        [length for length, _ in chunks],
        num_kv_heads=num_kv_heads,
        page_tokens=page_tokens,
        dtype=dtype,
        extra_columns=1,
    )
    before = bits(case.kv_cache)
    bounds = [0]
    for _, rows in chunks:
        bounds.append(bounds[-1] + rows)
    q = _randn(bounds[-1], num_kv_heads * group, 16, dtype=dtype)
    out = torch_ops.paged_prefill(
        q,
        case.kv_cache,
        case.layer,
        torch.tensor(bounds, dtype=torch.int32),
        case.block_tables,
        case.context_lens,
        0.3,
    )
    expected = torch.cat(
        [attention64(q[bounds[i] : bounds[i + 1]], case, i, 0.3) for i in range(len(chunks))]
    )
    assert_close(out, expected, dtype)
    assert torch.equal(bits(case.kv_cache), before)


def test_paged_prefill_of_one_row_equals_decode() -> None:
    case = make_paged_case([19, 3, 48])
    q = _randn(3, 4, 16)
    decoded = torch_ops.paged_decode(
        q, case.kv_cache, case.layer, case.block_tables, case.context_lens, 0.25
    )
    prefilled = torch_ops.paged_prefill(
        q,
        case.kv_cache,
        case.layer,
        torch.arange(4, dtype=torch.int32),
        case.block_tables,
        case.context_lens,
        0.25,
    )
    assert_close(prefilled, decoded.double(), torch.float32)
