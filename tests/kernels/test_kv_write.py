"""Rotating and writing to pages, the twin's and the kernel's, against complex fp64 math.

A token's key and query are turned as complex numbers in their first dims, as many as the table of
angles has; every other element must keep its bits.
"""

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from kernels import torch_ops, triton_ops
from tests.kernels.cases import DEVICE, ON_GPU, assert_close, bits, poisoned
from tests.kernels.elementwise import (
    EVERY_16_BIT_DTYPE,
    EVERY_DTYPE,
    EVERY_OPS,
    assert_replay_equals_eager,
    randn,
)
from tests.on_gpu import gpu_test

NUM_POSITIONS = 60
POSITIONS = (0, 59, 3, 3, 17, 58, 1, 2, 40)
LAYER = 1


@dataclass
class RotaryCase:
    """The arguments of the op but for the layer; q, k and v are columns of one fused matrix."""

    fused: torch.Tensor
    num_heads: int
    num_kv_heads: int
    cos_sin: torch.Tensor
    positions: torch.Tensor
    kv_cache: torch.Tensor
    kv_places: torch.Tensor

    def qkv(self, fused: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Views of `fused`, of [rows, heads, head_dim] each."""
        fused = self.fused if fused is None else fused
        head_dim = self.kv_cache.shape[5]
        sizes = [n * head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        return [part.unflatten(1, (-1, head_dim)) for part in fused.split(sizes, dim=1)]

    def run(self, ops: ModuleType) -> None:
        ops.rotary_kv_write(
            *self.qkv(), self.cos_sin, self.positions, self.kv_cache, LAYER, self.kv_places
        )


def _make_case(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_tokens: int = 8,
    dtype: torch.dtype = torch.float32,
    padding_rows: tuple[int, ...] = (),
    seed: int = 0,
    rotary_dim: int | None = None,
) -> RotaryCase:
    """Rows on slots in random order; the padding rows are NaN, their positions out of the table."""
    generator = torch.Generator().manual_seed(seed)
    rows, num_pages = len(POSITIONS), 7
    fused = randn(rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, seed=seed + 1)
    half = (rotary_dim or head_dim) // 2
    angles = torch.rand(NUM_POSITIONS, half, generator=generator) * 6
    positions = torch.tensor(POSITIONS)
    kv_places = torch.randperm(num_pages * page_tokens, generator=generator)[:rows]
    for row in padding_rows:
        fused[row] = torch.nan
        positions[row] = 2**40
        kv_places[row] = -1
    return RotaryCase(
        fused,
        num_heads,
        num_kv_heads,
        torch.cat((angles.cos(), angles.sin()), -1).to(DEVICE, dtype),
        positions.to(DEVICE),
        poisoned(num_pages, 3, 2, page_tokens, num_kv_heads, head_dim, dtype=dtype).to(DEVICE),
        kv_places.to(DEVICE),
    )


def _check(ops: ModuleType, case: RotaryCase) -> None:
    before, expected_cache = case.fused.clone(), case.kv_cache.clone()
    case.run(ops)
    q, k, v = case.qkv()
    page_tokens = case.kv_cache.shape[3]
    cos, sin = case.cos_sin.double().chunk(2, dim=-1)
    for row, slot in enumerate(case.kv_places.tolist()):
        if slot < 0:
            assert torch.equal(bits(case.fused[row]), bits(before[row])), "touched a padding row"
            continue
        turn = torch.complex(cos, sin)[case.positions[row]]
        before_q, before_k, before_v = (x[0] for x in case.qkv(before[row : row + 1]))
        for after, unturned in ((q[row], before_q), (k[row], before_k)):
            rotary_dim = 2 * turn.shape[-1]
            halves = unturned[:, :rotary_dim].double().chunk(2, dim=-1)
            turned = torch.complex(*halves) * turn
            expected = torch.cat((turned.real, turned.imag), -1)
            assert_close(after[:, :rotary_dim], expected, after.dtype)
            assert torch.equal(after[:, rotary_dim:], unturned[:, rotary_dim:])
        assert torch.equal(v[row], before_v)
        page_id, offset = divmod(slot, page_tokens)
        expected_cache[page_id, LAYER, 0, offset] = k[row]
        expected_cache[page_id, LAYER, 1, offset] = v[row]
    assert torch.equal(bits(case.kv_cache), bits(expected_cache)), "wrote beside the rows' tokens"


@EVERY_OPS
@EVERY_DTYPE
@pytest.mark.parametrize(
    "num_heads,num_kv_heads,head_dim",
    [(1, 1, 2), (6, 3, 10), (4, 2, 16), (32, 8, 64), (5, 5, 80), (3, 1, 96), (20, 20, 128)]
    + [(18, 9, 256)],
)
def test_heads(
    ops: ModuleType, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    _check(ops, _make_case(num_heads, num_kv_heads, head_dim, dtype=dtype))


@EVERY_OPS
@EVERY_DTYPE
@pytest.mark.parametrize(
    "num_heads,num_kv_heads,head_dim,rotary_dim",
    [(1, 1, 4, 2), (6, 3, 10, 4), (4, 2, 16, 8), (32, 8, 96, 72), (24, 8, 128, 96)]
    + [(3, 1, 80, 32), (5, 5, 96, 94)],
)
def test_heads_turned_in_part(
    ops: ModuleType,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
) -> None:
    case = _make_case(
        num_heads, num_kv_heads, head_dim, dtype=dtype, padding_rows=(4,), rotary_dim=rotary_dim
    )
    _check(ops, case)


@EVERY_OPS
@pytest.mark.parametrize("page_tokens", [8, 16, 24, 64])
def test_page_sizes(ops: ModuleType, page_tokens: int) -> None:
    _check(ops, _make_case(4, 2, 16, page_tokens))


@EVERY_OPS
@EVERY_DTYPE
@pytest.mark.parametrize("padding_rows", [(0,), (2, 3, 8), tuple(range(len(POSITIONS)))])
def test_padding_rows_are_left_alone(
    ops: ModuleType, padding_rows: tuple[int, ...], dtype: torch.dtype
) -> None:
    _check(ops, _make_case(4, 2, 16, dtype=dtype, padding_rows=padding_rows))


@EVERY_OPS
def test_no_rows(ops: ModuleType) -> None:
    case = _make_case(2, 1, 16)
    before = bits(case.kv_cache)
    case.fused, case.positions = case.fused[:0], case.positions[:0]
    case.kv_places = case.kv_places[:0]
    case.run(ops)
    assert torch.equal(bits(case.kv_cache), before)


@EVERY_OPS
def test_cache_with_layers_outermost(ops: ModuleType) -> None:
    case = _make_case(4, 2, 16)
    case.kv_cache = case.kv_cache.transpose(0, 1).contiguous().transpose(0, 1)
    _check(ops, case)


@EVERY_OPS
def test_tensors_of_their_own(ops: ModuleType) -> None:
    fused_case, case = (_make_case(4, 2, 16) for _ in range(2))
    fused_case.run(ops)
    q, k, v = (x.contiguous() for x in case.qkv())
    ops.rotary_kv_write(q, k, v, case.cos_sin, case.positions, case.kv_cache, LAYER, case.kv_places)
    for actual, expected in zip((q, k, v), fused_case.qkv(), strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(bits(case.kv_cache), bits(fused_case.kv_cache))


@pytest.mark.skipif(ON_GPU, reason="compiled code rounds once where it fuses multiply and add")
@EVERY_16_BIT_DTYPE
@pytest.mark.parametrize("rotary_dim", [80, 60])
def test_kernel_has_the_bits_of_the_twin(dtype: torch.dtype, rotary_dim: int) -> None:
    case, twin_case = (_make_case(20, 4, 80, dtype=dtype, rotary_dim=rotary_dim) for _ in range(2))
    case.run(triton_ops)
    twin_case.run(torch_ops)
    assert torch.equal(case.fused, twin_case.fused)
    assert torch.equal(bits(case.kv_cache), bits(twin_case.kv_cache))


@gpu_test
def test_graph_replay_equals_eager() -> None:
    cases = [
        _make_case(32, 8, 128, 16, torch.bfloat16, padding_rows, seed)
        for seed, padding_rows in enumerate([(), (1, 7, 8), tuple(range(len(POSITIONS)))])
    ]

    def run(
        fused: torch.Tensor, positions: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        q, k, v = cases[0].qkv(fused)
        triton_ops.rotary_kv_write(q, k, v, cases[0].cos_sin, positions, kv_cache, LAYER, slots)

    assert_replay_equals_eager(
        run, [(case.fused, case.positions, case.kv_cache, case.kv_places) for case in cases]
    )


@gpu_test
def test_pages_beyond_what_an_int32_counts() -> None:
    case = _make_case(4, 2, 64, 64, torch.bfloat16)
    page_elems = 3 * 2 * 64 * 2 * 64
    num_pages = 2**31 // page_elems + 8
    case.kv_places += (num_pages - 7) * 64
    case.kv_cache = torch.zeros(
        num_pages, *case.kv_cache.shape[1:], dtype=torch.bfloat16, device=DEVICE
    )
    case.run(triton_ops)
    pages, offsets = case.kv_places // 64, case.kv_places % 64
    _, k, v = case.qkv()
    assert torch.equal(case.kv_cache[pages, LAYER, 0, offsets], k)
    assert torch.equal(case.kv_cache[pages, LAYER, 1, offsets], v)
