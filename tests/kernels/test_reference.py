"""The torch twins against dense fp64 math that knows neither pages nor segments."""

import pytest
import torch

from kernels import reference
from tests.kernels.cases import (
    assert_close,
    attention64,
    bits,
    make_lora_case,
    make_paged_case,
    poisoned,
)
from tests.popularity import PATTERNS, draw_adapters

DTYPES = (torch.float32, torch.float16)


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _rms_norm64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (2, 1023), (3, 4, 16), (0, 8)])
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
def test_rms_norm(shape: tuple[int, ...], eps: float, dtype: torch.dtype) -> None:
    x, weight = _randn(*shape, dtype=dtype), 1 + _randn(shape[-1], dtype=dtype, seed=1)
    y = reference.rms_norm(x, weight, eps)
    assert y.dtype == dtype
    assert_close(y, _rms_norm64(x, weight, eps), dtype)


def test_rms_norm_means_in_fp32() -> None:
    # Squares of 300 overflow fp16.
    x = torch.full((2, 128), 300.0, dtype=torch.float16)
    y = reference.rms_norm(x, torch.ones(128, dtype=torch.float16), 1e-6)
    assert_close(y, torch.ones(2, 128, dtype=torch.float64), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (5, 65), (0, 8)])
def test_add_rms_norm_updates_the_residual(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = _randn(*shape, dtype=dtype), _randn(*shape, dtype=dtype, seed=1)
    weight = 1 + _randn(shape[-1], dtype=dtype, seed=2)
    x_before, total = x.clone(), x + residual
    y = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert torch.equal(x, x_before)
    assert_close(y, _rms_norm64(total, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,features", [(1, 1), (3, 7), (5, 96), (0, 4)])
def test_silu_mul(rows: int, features: int, dtype: torch.dtype) -> None:
    gate_up = 3 * _randn(rows, 2 * features, dtype=dtype)
    before = gate_up.clone()
    y = reference.silu_mul(gate_up)
    gate, up = gate_up[:, :features].double(), gate_up[:, features:].double()
    # Outputs reach ten, where one unit in the last place of fp16 is already 8e-3.
    assert_close(y / 8, gate / (1 + (-gate).exp()) * up / 8, dtype)
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads,num_kv_heads,head_dim", [(1, 1, 2), (4, 2, 16), (6, 3, 10)])
@pytest.mark.parametrize("page_tokens", [8, 24])
def test_rotary_kv_write(
    num_heads: int, num_kv_heads: int, head_dim: int, page_tokens: int, dtype: torch.dtype
) -> None:
    rows, num_pages, num_layers, layer = 9, 7, 3, 1
    half = head_dim // 2
    angles = torch.rand(60, half, generator=torch.Generator().manual_seed(5)) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
    # q, k and v are columns of one fused matrix, as the decoder passes them.
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    q, k, v = (
        part.view(rows, -1, head_dim)
        for part in _randn(rows, sum(sizes), dtype=dtype).split(sizes, 1)
    )
    before_q, before_k, before_v = q.double(), k.double(), v.clone()
    positions = torch.tensor([0, 59, 3, 3, 17, 58, 1, 2, 40])
    slots = torch.randperm(num_pages * page_tokens, generator=torch.Generator().manual_seed(6))
    slot_mapping = slots[:rows]
    kv_cache = poisoned(num_pages, num_layers, 2, page_tokens, num_kv_heads, head_dim, dtype=dtype)
    expected_cache = kv_cache.clone()

    reference.rotary_kv_write(q, k, v, cos_sin, positions, kv_cache, layer, slot_mapping)

    turn = torch.polar(torch.ones_like(angles).double(), angles.double())[positions][:, None]
    for after, before in ((q, before_q), (k, before_k)):
        rotated = torch.complex(before[..., :half], before[..., half:]) * turn
        assert_close(after, torch.cat((rotated.real, rotated.imag), -1), dtype)
    assert torch.equal(v, before_v)
    for row, slot in enumerate(slot_mapping.tolist()):
        page_id, offset = divmod(slot, page_tokens)
        expected_cache[page_id, layer, 0, offset] = k[row]
        expected_cache[page_id, layer, 1, offset] = v[row]
    assert torch.equal(bits(kv_cache), bits(expected_cache)), "wrote beside the rows' own tokens"


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
    out = reference.paged_decode(
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
    out = reference.paged_decode(q, *args)
    assert torch.equal(out, reference.paged_decode(q.contiguous(), *args))


@pytest.mark.parametrize("context_lens", [[0], [0, 9, 0], [40, 0, 1]])
def test_paged_decode_beside_padding_rows(context_lens: list[int]) -> None:
    case = make_paged_case(context_lens)
    q = _randn(len(context_lens), 4, 16)
    out = reference.paged_decode(
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

    gather_kv = reference._gather_kv
    monkeypatch.setattr(reference, "_gather_kv", gather)
    q = _randn(len(context_lens), 2, 16)
    out = reference.paged_decode(
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
    out = reference.paged_prefill(
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
    decoded = reference.paged_decode(
        q, case.kv_cache, case.layer, case.block_tables, case.context_lens, 0.25
    )
    prefilled = reference.paged_prefill(
        q,
        case.kv_cache,
        case.layer,
        torch.arange(4, dtype=torch.int32),
        case.block_tables,
        case.context_lens,
        0.25,
    )
    assert_close(prefilled, decoded.double(), torch.float32)


# Module dims of odd sizes: two that share an input of 100, as q and v do, and one absent module.
DIMS = [(100, 70), (100, 33), (100, 128)]
MODULES = (0, 1, 2)
OUT_OFFSETS = (0, 70, 103, 231)
# Ranks of a slot's modules; 0 is absent. Slots 7 and 8 lack modules, as a q,v-only adapter does.
RANKS = [
    *[[r, r, r] for r in (1, 3, 8, 16, 33, 64, 256)],
    [8, 0, 8],
    [0, 5, 0],
    [4, 200, 16],
]


def _check_lora(
    runs: list[tuple[int, int]],
    dtype: torch.dtype,
    page_elems: int = 1024,
    modules: tuple[int, ...] = MODULES,
    out_offsets: tuple[int, ...] = OUT_OFFSETS,
) -> None:
    """Shrink and expand both layers of a case; every row against dense math, or untouched."""
    case = make_lora_case(runs, RANKS, DIMS, page_elems=page_elems, dtype=dtype)
    num_rows = len(case.row_slots)
    x = _randn(num_rows, 100, dtype=dtype)
    pool_before = bits(case.pool)
    for layer in (0, 1):
        v = reference.lora_shrink(x, case.pool, layer, modules, case.segments)
        assert v.dtype == torch.float32
        assert v.shape == (1, len(modules), num_rows, case.segments.max_rank)
        # What is unspecified must not be read: poison it.
        for m, module in enumerate(modules):
            for row, slot in enumerate(case.row_slots):
                weights = case.weights.get((slot, layer, module))
                rank = 0 if weights is None else weights[0].shape[0]
                if weights is not None:
                    assert_close(
                        v[0, m, row, :rank], x[row].double() @ weights[0].double().T, dtype
                    )
                v[0, m, row, rank:] = torch.nan

        y = _randn(num_rows, out_offsets[-1], dtype=dtype, seed=2)
        base = y.clone()
        reference.lora_expand(y, v, case.pool, layer, modules, out_offsets, case.segments)
        for m, module in enumerate(modules):
            left, right = out_offsets[m], out_offsets[m + 1]
            deltas = case.deltas(x, layer, module, right - left)
            for row in range(num_rows):
                actual, before = y[row, left:right], base[row, left:right]
                if row in deltas:
                    assert_close(actual, before.double() + deltas[row], dtype)
                else:
                    assert torch.equal(bits(actual), bits(before)), f"row {row} was touched"
    assert torch.equal(bits(case.pool), pool_before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_elems", [64, 1024, 64 * 67, 1 << 18])
def test_lora_mixed_ranks_and_empty_segments(page_elems: int, dtype: torch.dtype) -> None:
    runs = [
        (-1, 2),
        (3, 0),
        (0, 1),
        (7, 3),
        (6, 2),
        (-1, 0),
        (9, 5),
        (1, 1),
        (8, 2),
        (5, 7),
        (-1, 1),
    ]
    _check_lora(runs, dtype, page_elems)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_lora_popularity(pattern: str, dtype: torch.dtype) -> None:
    # Row i draws a slot, or the base model; rows are ordered by slot as in a batch.
    slots = sorted(slot - 1 for slot in draw_adapters(pattern, 33, len(RANKS) + 1, seed=1))
    if pattern == "identical":
        slots = [4] * 33
    runs = [(slot, slots.count(slot)) for slot in sorted(set(slots))]
    _check_lora(runs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slot", range(len(RANKS)))
def test_lora_single_row(slot: int, dtype: torch.dtype) -> None:
    _check_lora([(slot, 1)], dtype)


def test_lora_same_slot_in_two_segments() -> None:
    # Decode rows and prefill rows of one adapter are two runs.
    _check_lora([(2, 2), (4, 1), (2, 3)], torch.float32)


def test_lora_of_some_modules() -> None:
    _check_lora([(9, 2), (0, 3)], torch.float32, modules=(1, 2), out_offsets=(0, 33, 161))
    _check_lora([(9, 2), (8, 3)], torch.float32, modules=(1,), out_offsets=(0, 33))


def test_lora_all_rows_base_changes_nothing() -> None:
    _check_lora([(-1, 4), (-1, 1)], torch.float32)
    _check_lora([(3, 0), (-1, 2)], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_repeats_bit_for_bit(dtype: torch.dtype) -> None:
    case = make_lora_case([(6, 3), (-1, 1), (2, 4)], RANKS, DIMS, dtype=dtype)
    x = _randn(8, 100, dtype=dtype)
    results = []
    for _ in range(2):
        y = torch.zeros(8, OUT_OFFSETS[-1], dtype=dtype)
        v = reference.lora_shrink(x, case.pool, 0, MODULES, case.segments)
        reference.lora_expand(y, v, case.pool, 0, MODULES, OUT_OFFSETS, case.segments)
        results.append(bits(y))
    assert torch.equal(*results)
