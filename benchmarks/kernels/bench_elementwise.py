"""The elementwise kernels on one GPU beside the bandwidth of a copy.

`python -m benchmarks.kernels.bench_elementwise`: add_rms_norm, silu_mul and rotary_kv_write of a
Llama-7B layer for decode batches and a prefill. Every case is first compared with the torch twin;
where they differ there is no report. Calls run inside CUDA graphs over inputs that exceed the L2
cache several times, weights included.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.gpu_timer import copy_bandwidth, graph_time_us, require_cuda
from benchmarks.report import add_output_option, make_row, publish
from kernels import torch_ops, triton_ops
from tests.kernels.cases import TOLERANCES

ROWS = (1, 64, 256, 8192)
# What a graph's calls move in turn, at least: four times the L2 cache of an H100.
COLD_BYTES = 200e6
EPS = 1e-5
NUM_POSITIONS = 4096
# Keys and values are written to the last of these layers.
NUM_LAYERS = 2

Calls = list[Callable[[], object]]


class WrongResultError(RuntimeError):
    """A kernel and its twin differ."""


@dataclass(frozen=True)
class Shape:
    """A Llama-7B's by default."""

    hidden: int = 4096
    intermediate: int = 11008
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    page_tokens: int = 16


class Inputs:
    """Random tensors of a dtype on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def randn(self, *shape: int) -> torch.Tensor:
        x = torch.empty(shape, dtype=self.dtype, device=self._generator.device)
        return x.normal_(generator=self._generator)

    def randint(self, end: int, *shape: int) -> torch.Tensor:
        device = self._generator.device
        return torch.randint(end, shape, generator=self._generator, device=device)

    def randperm(self, end: int) -> torch.Tensor:
        return torch.randperm(end, generator=self._generator, device=self._generator.device)


@dataclass(frozen=True)
class Case:
    """An op at a number of rows."""

    name: str
    rows: int
    # What one call must move: each input read once, each output written once.
    num_bytes: int
    # One call for each set of inputs.
    calls: Calls
    # What kernel and twin give for the same inputs, tensor by tensor.
    compared: list[tuple[torch.Tensor, torch.Tensor]]


def add_rms_norm_case(rows: int, shape: Shape, inputs: Inputs) -> Case:
    num_bytes = (4 * rows + 1) * shape.hidden * inputs.dtype.itemsize
    num_sets = _num_sets(num_bytes)
    x, residual = (inputs.randn(num_sets, rows, shape.hidden) for _ in range(2))
    weight = inputs.randn(num_sets, shape.hidden)
    twin_residual = residual[0].clone()
    twin = torch_ops.add_rms_norm(x[0], twin_residual, weight[0], EPS)
    ours = triton_ops.add_rms_norm(x[0], residual[0], weight[0], EPS)
    calls: Calls = [
        lambda args=args: triton_ops.add_rms_norm(*args, EPS)
        for args in zip(x, residual, weight, strict=True)
    ]
    compared = [(ours, twin), (residual[0].clone(), twin_residual)]
    return Case("add_rms_norm", rows, num_bytes, calls, compared)


def silu_mul_case(rows: int, shape: Shape, inputs: Inputs) -> Case:
    num_bytes = 3 * rows * shape.intermediate * inputs.dtype.itemsize
    gate_up = inputs.randn(_num_sets(num_bytes), rows, 2 * shape.intermediate)
    calls: Calls = [lambda x=x: triton_ops.silu_mul(x) for x in gate_up]
    compared = [(triton_ops.silu_mul(gate_up[0]), torch_ops.silu_mul(gate_up[0]))]
    return Case("silu_mul", rows, num_bytes, calls, compared)


def rotary_kv_write_case(rows: int, shape: Shape, inputs: Inputs) -> Case:
    """Columns of one fused projection; every row's token on a slot of its own, at random.

    The angles are not counted among the bytes: their table stays in the cache.
    """
    widths = [n * shape.head_dim for n in (shape.num_heads, *[shape.num_kv_heads] * 2)]
    q_width, kv_width, _ = widths
    num_bytes = rows * (2 * q_width + 5 * kv_width) * inputs.dtype.itemsize
    num_sets = _num_sets(num_bytes)
    fused = inputs.randn(num_sets, rows, sum(widths))
    positions = inputs.randint(NUM_POSITIONS, num_sets, rows)
    num_pages = -(-num_sets * rows // shape.page_tokens)
    page = (2, shape.page_tokens, shape.num_kv_heads, shape.head_dim)
    kv_cache = inputs.randn(num_pages, NUM_LAYERS, *page)
    slots = inputs.randperm(num_pages * shape.page_tokens)[: num_sets * rows].view(num_sets, rows)
    angles = 6 * inputs.randn(NUM_POSITIONS, shape.head_dim // 2).float()
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(inputs.dtype)

    def arguments(index: int, fused: torch.Tensor, cache: torch.Tensor) -> tuple[Any, ...]:
        qkv = (part.unflatten(1, (-1, shape.head_dim)) for part in fused.split(widths, dim=1))
        return *qkv, cos_sin, positions[index], cache, NUM_LAYERS - 1, slots[index]

    twin_fused, twin_cache = fused[0].clone(), kv_cache.clone()
    torch_ops.rotary_kv_write(*arguments(0, twin_fused, twin_cache))
    triton_ops.rotary_kv_write(*arguments(0, fused[0], kv_cache))
    compared = [(fused[0].clone(), twin_fused), (kv_cache.clone(), twin_cache)]
    calls: Calls = [
        partial(triton_ops.rotary_kv_write, *arguments(index, fused[index], kv_cache))
        for index in range(num_sets)
    ]
    return Case("rotary_kv_write", rows, num_bytes, calls, compared)


MAKERS = (add_rms_norm_case, silu_mul_case, rotary_kv_write_case)


def _num_sets(num_bytes: int) -> int:
    """How many inputs of a call make the cache cold, at least two."""
    return max(2, math.ceil(COLD_BYTES / num_bytes))


def make_cases(
    rows: Sequence[int],
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Iterator[Case]:
    """One at a time, since those of many rows take a gigabyte or two."""
    for make_case in MAKERS:
        for num_rows in rows:
            yield make_case(num_rows, shape, Inputs(device, dtype, seed))


def check(case: Case) -> None:
    """Raises:
    WrongResultError: kernel and twin differ by more than the tolerance of the dtype.
    """
    for ours, twin in case.compared:
        rtol, atol = TOLERANCES[twin.dtype]
        try:
            torch.testing.assert_close(ours, twin, rtol=rtol, atol=atol)
        except AssertionError as error:
            raise WrongResultError(f"{case.name} of {case.rows} rows: {error}") from error


def measure(
    case: Case, time_us: Callable[[Calls], float], copy_bytes_per_s: float
) -> dict[str, Any]:
    us = time_us(case.calls)
    bytes_per_s = case.num_bytes / us * 1e6
    return {
        "op": case.name,
        "rows": case.rows,
        "us": round(us, 2),
        "tb_per_s": round(bytes_per_s / 1e12, 3),
        "of_copy": round(bytes_per_s / copy_bytes_per_s, 3),
    }


def table(rows: Sequence[dict[str, Any]], copy_bytes_per_s: float) -> str:
    lines = [f"{'':<18}{'rows':>6}{'us':>9}{'TB/s':>8}{'of copy':>9}"]
    lines += [
        f"{row['op']:<18}{row['rows']:>6}{row['us']:>9.2f}{row['tb_per_s']:>8.2f}"
        f"{row['of_copy']:>9.1%}"
        for row in rows
    ]
    return "\n".join([*lines, f"copy: {copy_bytes_per_s / 1e12:.2f} TB/s"])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    add_output_option(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    require_cuda()
    shape, dtype = Shape(), torch.bfloat16
    copy_bytes_per_s = copy_bandwidth()
    rows = []
    for case in make_cases(ROWS, shape, torch.device("cuda"), dtype, args.seed):
        try:
            check(case)
        except WrongResultError as error:
            sys.exit(f"no report: {error}")
        rows.append(measure(case, graph_time_us, copy_bytes_per_s))
    print(table(rows, copy_bytes_per_s))
    figures = {"copy_bytes_per_s": round(copy_bytes_per_s), "rows": rows}
    config = {**asdict(shape), "dtype": "bfloat16"}
    publish(make_row("elementwise", figures, config, args.seed), args.output)


if __name__ == "__main__":
    main()
