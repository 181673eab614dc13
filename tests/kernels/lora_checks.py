"""What every implementation of the LoRA ops must do, checked against dense fp64 math."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from kernels import torch_ops
from kernels.launch_configs import ExpandLaunch, ShrinkLaunch
from kernels.lora_expand import lora_expand
from kernels.lora_shrink import lora_shrink
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


@dataclass(frozen=True)
class LoraOps:
    """An implementation and where it runs; `block_rows` None is one that takes no tiles."""

    shrink: Callable[..., torch.Tensor]
    expand: Callable[..., None]
    device: torch.device
    block_rows: int | None = None


def triton_ops(
    block_rows: int,
    shrink_launch: ShrinkLaunch | None = None,
    expand_launch: ExpandLaunch | None = None,
) -> LoraOps:
    shrink = partial(lora_shrink, launch=shrink_launch)
    return LoraOps(shrink, partial(lora_expand, launch=expand_launch), DEVICE, block_rows)


TWIN = LoraOps(torch_ops.lora_shrink, torch_ops.lora_expand, torch.device("cpu"))


def _each(triton_dtypes: Sequence[torch.dtype]) -> pytest.MarkDecorator:
    """The twin, and the kernels by tiles of 16 rows and of 64."""
    return pytest.mark.parametrize(
        "ops,dtype",
        [pytest.param(TWIN, dtype, id=f"twin-{dtype}") for dtype in TWIN_DTYPES]
        + [
            pytest.param(triton_ops(block_rows), dtype, id=f"triton{block_rows}-{dtype}")
            for block_rows in (16, 64)
            for dtype in triton_dtypes
        ],
    )


each_implementation = _each(SHAPE_DTYPES)
each_implementation_and_dtype = _each(DTYPES)

# Module dims of odd sizes: three that share an input of 100, as q, k and v do.
DIMS = [(100, 70), (100, 33), (100, 128)]
# Ranks of a slot's modules; 0 is absent. Slots 8 and 9 lack modules, as a q,v-only adapter does.
RANKS = [
    *[[r, r, r] for r in (1, 3, 8, 16, 33, 64, 200, 256)],
    [8, 0, 8],
    [0, 5, 0],
    [4, 200, 16],
]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_lora(
    ops: LoraOps,
    dtype: torch.dtype,
    runs: Sequence[tuple[int, int]],
    *,
    ranks: Sequence[Sequence[int]] = RANKS,
    dims: Sequence[tuple[int, int]] = DIMS,
    modules: tuple[int, ...] | None = None,
    layers: Sequence[int] = (0, 1),
    **options: Any,
) -> None:
    """Shrink and expand `modules` (default: all) of a case of `make_lora_case`."""
    case = make_lora_case(runs, ranks, dims, dtype=dtype, block_rows=ops.block_rows, **options)
    check_case(ops, dtype, case, dims, modules or tuple(range(len(dims))), layers)


def check_case(
    ops: LoraOps,
    dtype: torch.dtype,
    case: LoraCase,
    dims: Sequence[tuple[int, int]],
    modules: tuple[int, ...],
    layers: Sequence[int],
) -> None:
    """Every row against dense math, or untouched; memory that nobody wrote must be NaN."""
    assert torch.empty(1).isnan().all(), "the fixture poisoned_memory is in use"
    on_device = case.to(ops.device)
    pool_before = bits(on_device.pool)
    num_rows, in_features = len(case.row_slots), dims[modules[0]][0]
    out_offsets = [0]
    for module in modules:
        out_offsets.append(out_offsets[-1] + dims[module][1])
    x = randn(num_rows, in_features, dtype=dtype)
    base = randn(num_rows, out_offsets[-1], dtype=dtype, seed=2)
    # Adding zero to a negative zero changes its bits.
    base[:, ::3] = -0.0
    for layer in layers:
        args = on_device.pool, layer, modules
        v = ops.shrink(x.to(ops.device), *args, on_device.segments)
        assert v.dtype == torch.float32
        assert v.shape[1:] == (len(modules), num_rows, case.segments.max_rank)
        y = base.clone().to(ops.device)
        ops.expand(y, v, *args, tuple(out_offsets), on_device.segments)

        sums, y = v.sum(0).cpu(), y.cpu()
        for m, module in enumerate(modules):
            left, right = out_offsets[m], out_offsets[m + 1]
            deltas = case.deltas(x, layer, module, right - left)
            for row, slot in enumerate(case.row_slots):
                actual, before = y[row, left:right], base[row, left:right]
                if (slot, layer, module) in case.weights:
                    a, _, _ = case.weights[slot, layer, module]
                    shrunk = naive.lora_shrink(x[row], a)
                    assert_close(sums[m, row, : a.shape[0]], shrunk, dtype)
                    assert_close(actual, before.double() + deltas[row], dtype)
                else:
                    assert torch.equal(bits(actual), bits(before)), f"row {row} was touched"
    assert torch.equal(bits(on_device.pool), pool_before)
