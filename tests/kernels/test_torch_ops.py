"""The torch ops, which serve on a CPU, against the naive ones.

Of attention here are all tests; the other ops are also tested with their kernels, by the same
checks.
"""

import importlib

import pytest
import torch

from kernels import torch_ops
from tests.kernels import naive
from tests.kernels.cases import (
    TWIN_DTYPES,
    LoraCase,
    assert_close,
    attention64,
    bits,
    make_lora_case,
    make_paged_case,
)

EPS = 1e-5
LAYER = 1
# Adapters of gate and up, of which one lacks up, and rows of the base model.
LORA_RUNS = [(0, 3), (-1, 2), (1, 1), (2, 5)]
LORA_RANKS = [[8, 8], [33, 0], [1, 64]]
WIDTH = 70

each_dtype = pytest.mark.parametrize("dtype", TWIN_DTYPES)


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_every_op_is_compared() -> None:
    assert {f"test_{name}" for name in torch_ops.__all__} <= set(globals())


@each_dtype
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = _randn(5, 3, 80, dtype=dtype), _randn(80, dtype=dtype, seed=1)
    assert_close(torch_ops.rms_norm(x, weight, EPS), naive.rms_norm(x, weight, EPS), dtype)


@each_dtype
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual, weight = (_randn(5, 80, dtype=dtype, seed=seed) for seed in range(3))
    expected, total = naive.add_rms_norm(x, residual, weight[0], EPS)
    assert_close(torch_ops.add_rms_norm(x, residual, weight[0], EPS), expected, dtype)
    assert torch.equal(residual, total)


@each_dtype
def test_silu_mul(dtype: torch.dtype) -> None:
    gate_up = _randn(5, 96, dtype=dtype)
    assert_close(torch_ops.silu_mul(gate_up), naive.silu_mul(gate_up), dtype)


@each_dtype
def test_rotary_kv_write(dtype: torch.dtype) -> None:
    q, k, v = (_randn(3, heads, 16, dtype=dtype, seed=heads) for heads in (6, 2, 2))
    angles = 6 * torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
    positions, slots = torch.tensor([49, 0, 7]), torch.tensor([11, 3, 30])
    kv_cache = make_paged_case([20, 8], page_tokens=8, dtype=dtype).kv_cache
    expected_q, expected_k = (naive.rotated(x, cos_sin, positions) for x in (q, k))
    expected_cache = kv_cache.clone()
    torch_ops.rotary_kv_write(q, k, v, cos_sin, positions, kv_cache, LAYER, slots)
    assert_close(q, expected_q, dtype)
    assert_close(k, expected_k, dtype)
    for row, slot in enumerate(slots.tolist()):
        expected_cache[slot // 8, LAYER, :, slot % 8] = torch.stack((k[row], v[row]))
    assert torch.equal(bits(kv_cache), bits(expected_cache))


def _lora_case(dtype: torch.dtype) -> tuple[LoraCase, torch.Tensor, torch.Tensor]:
    """The case, its rows of inputs and the output of gate and up that is to be changed."""
    case = make_lora_case(LORA_RUNS, LORA_RANKS, [(100, WIDTH)] * 2, dtype=dtype)
    rows = len(case.row_slots)
    return case, _randn(rows, 100, dtype=dtype), _randn(rows, 2 * WIDTH, dtype=dtype, seed=1)


@each_dtype
def test_lora_shrink(dtype: torch.dtype) -> None:
    case, x, _ = _lora_case(dtype)
    v = torch_ops.lora_shrink(x, case.pool, LAYER, (0, 1), case.segments)
    for (slot, layer, module), (a, _, _) in case.weights.items():
        rows = [row for row, other in enumerate(case.row_slots) if other == slot]
        if layer == LAYER:
            actual = v.sum(0)[module, rows, : a.shape[0]]
            assert_close(actual, naive.lora_shrink(x[rows], a), dtype)


@each_dtype
def test_lora_expand(dtype: torch.dtype) -> None:
    case, x, y = _lora_case(dtype)
    deltas = torch.cat([case.deltas(x, LAYER, module, WIDTH) for module in range(2)], 1)
    before = y.clone()
    args = case.pool, LAYER, (0, 1)
    v = torch_ops.lora_shrink(x, *args, case.segments)
    torch_ops.lora_expand(y, v, *args, (0, WIDTH, 2 * WIDTH), case.segments)
    assert_close(y, before.double() + deltas, dtype)
    base = [row for row, slot in enumerate(case.row_slots) if slot < 0]
    assert torch.equal(bits(y[base]), bits(before[base]))


@each_dtype
def test_lora_silu_mul(dtype: torch.dtype) -> None:
    case, x, gate_up = _lora_case(dtype)
    deltas = torch.cat([case.deltas(x, LAYER, module, WIDTH) for module in range(2)], 1)
    expected = naive.lora_silu_mul(gate_up, deltas)
    args = case.pool, LAYER, (0, 1)
    v = torch_ops.lora_shrink(x, *args, case.segments)
    # Outputs reach ten, and their inputs were rounded before.
    assert_close(torch_ops.lora_silu_mul(gate_up, v, *args, case.segments) / 8, expected / 8, dtype)


@each_dtype
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


@each_dtype
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
