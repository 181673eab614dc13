"""LoRA kernels of decode steps on one GPU: bandwidth on weights that must move, beside a copy.

`python -m benchmarks.bench_lora_kernels`: shrink and expand of q, k, v and of o of a Llama-7B's
layers, adapters on randomly scattered pages of a unified pool. Every case is first compared with
the torch twins; where they differ there is no report. Calls run inside CUDA graphs over layers and
adapters in turn, so that the L2 cache is cold.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.dummy_adapters import ADAPTER_STD, uniform_layout
from benchmarks.engine_workloads import ATTENTION, SHAPES
from benchmarks.gpu_timer import copy_bandwidth, graph_time_us, require_cuda
from benchmarks.report import add_output_option, make_row, publish
from kernels import reference, triton_ops
from kernels.lora_segments import DECODE_BLOCK_ROWS, LoraSegments, LoraTiles, plan_tiles
from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.config import LORA_MODULES, EngineConfig, ModelConfig
from slora_core.execution.buckets import RANK_BUCKETS, bucket_of
from slora_core.layers.lora import O_PROJ, QKV, lora_groups
from tests.popularity import draw_adapters

NUM_ADAPTERS = 64
RANKS = {"8": (8,), "64": (64,), "64/32/16/8": (64, 32, 16, 8)}
# Popularity of adapters by batch size; one row uses every adapter in turn.
CASES = [(batch, "distinct") for batch in (1, 32, 64)]
CASES += [(64, pattern) for pattern in ("identical", "uniform", "zipf")]
GROUPS = (QKV, O_PROJ)
# What a graph's calls read at least, several times the L2 cache.
COLD_BYTES = 400 * 10**6
# Largest difference from the twins, relative to the norm, in bf16.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Adapters:
    """All adapters of one rank pattern, resident in a pool."""

    model: ModelConfig
    pool: torch.Tensor
    page_tables: torch.Tensor
    offsets: torch.Tensor
    scaling: torch.Tensor
    ranks: list[int]

    def layer_bytes(self, slots: Sequence[int]) -> int:
        """Of the weights that these adapters have in one layer's q, k, v and o."""
        groups = [lora_groups(self.model)[name] for name in GROUPS]
        elems = sum(sum(self.model.module_dims[m]) for group in groups for m in group.modules)
        return sum(self.ranks[slot] for slot in set(slots)) * elems * self.pool.element_size()


def make_adapters(
    model: ModelConfig,
    ranks: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
) -> Adapters:
    """Adapter i has rank `ranks[i % len(ranks)]` on q, k, v, o, and random weights."""
    geometry = AdapterGeometry.of(model, EngineConfig(dtype=dtype))
    of_rank = {rank: uniform_layout(geometry, ATTENTION, rank) for rank in ranks}
    all_ranks = [ranks[i % len(ranks)] for i in range(NUM_ADAPTERS)]
    layouts = [of_rank[rank] for rank in all_ranks]
    num_pages = sum(layout.num_pages for layout in layouts)
    shape = num_pages, model.num_layers, geometry.page_elems
    generator = torch.Generator(device).manual_seed(seed)
    pool = torch.empty(shape, dtype=dtype, device=device)
    pool.normal_(0.0, ADAPTER_STD, generator=generator)
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).int()
    tables = torch.zeros(NUM_ADAPTERS, max(layout.num_pages for layout in layouts)).int()
    first = 0
    for slot, layout in enumerate(layouts):
        tables[slot, : layout.num_pages] = order[first : first + layout.num_pages]
        first += layout.num_pages
    return Adapters(
        model,
        pool,
        tables.to(device),
        torch.stack([layout.offsets for layout in layouts]).to(device),
        torch.stack([layout.scaling for layout in layouts]).to(device),
        all_ranks,
    )


def make_segments(adapters: Adapters, slots: Sequence[int]) -> LoraSegments:
    """Segments of one row or more of each adapter, as a decode step has them."""
    ordered = sorted(slots)
    indptr = [i for i, slot in enumerate(ordered) if i == 0 or slot != ordered[i - 1]]
    seg_slots = [ordered[i] for i in indptr]
    indptr.append(len(ordered))
    device = adapters.pool.device
    tiles = plan_tiles(indptr, seg_slots, DECODE_BLOCK_ROWS)
    # As many entries as a graph of this batch size has.
    num_tiles = max(len(ordered), len(tiles))
    return LoraSegments(
        seg_indptr=torch.tensor(indptr, dtype=torch.int32, device=device),
        seg_slots=torch.tensor(seg_slots, dtype=torch.int32, device=device),
        page_tables=adapters.page_tables,
        offsets=adapters.offsets,
        scaling=adapters.scaling,
        max_rank=bucket_of(max(adapters.ranks[slot] for slot in ordered), RANK_BUCKETS),
        modules=frozenset(LORA_MODULES.index(name) for name in ATTENTION),
        tiles=LoraTiles.of(tiles, DECODE_BLOCK_ROWS, num_tiles, device),
    )


def layer_calls(
    adapters: Adapters, segments: LoraSegments, layer: int
) -> tuple[list[Callable[[], torch.Tensor]], list[Callable[[], None]]]:
    """Shrinks and expands of a layer's q, k, v and of its o, each over tensors of its own."""
    rows = int(segments.seg_indptr[-1])
    dtype, device = adapters.pool.dtype, adapters.pool.device
    shrinks, expands = [], []
    for name in GROUPS:
        group = lora_groups(adapters.model)[name]
        x = torch.randn(rows, adapters.model.hidden_size, dtype=dtype, device=device)
        y = torch.randn(rows, group.out_offsets[-1], dtype=dtype, device=device)
        pool, modules, bounds = adapters.pool, group.modules, group.out_offsets
        v = triton_ops.lora_shrink(x, pool, layer, modules, segments)

        def shrink(x=x, pool=pool, modules=modules) -> torch.Tensor:
            return triton_ops.lora_shrink(x, pool, layer, modules, segments)

        def expand(y=y, v=v, pool=pool, modules=modules, bounds=bounds) -> None:
            triton_ops.lora_expand(y, v, pool, layer, modules, bounds, segments)

        shrinks.append(shrink)
        expands.append(expand)
    return shrinks, expands


def check(adapters: Adapters, segments: LoraSegments, layer: int) -> None:
    """Raises AssertionError where the kernels do not do what their twins do."""
    rows, pool = int(segments.seg_indptr[-1]), adapters.pool
    for name in GROUPS:
        group = lora_groups(adapters.model)[name]
        x = torch.randn(rows, adapters.model.hidden_size, dtype=pool.dtype, device=pool.device)
        results = []
        for ops in (triton_ops, reference):
            y = torch.zeros(rows, group.out_offsets[-1], dtype=x.dtype, device=x.device)
            v = ops.lora_shrink(x, pool, layer, group.modules, segments)
            ops.lora_expand(y, v, pool, layer, group.modules, group.out_offsets, segments)
            results.append(y.float())
        actual, expected = results
        error = float((actual - expected).norm() / expected.norm())
        assert error < TOLERANCE, f"{name} differs from its twin by {error:.2g} of its norm"


def measure(adapters: Adapters, batch: int, popularity: str, seed: int) -> dict[str, Any]:
    """us of a layer's four launches, and bandwidth on its weights."""
    num_layers = adapters.model.num_layers
    drawn = [draw_adapters(popularity, batch, NUM_ADAPTERS, seed + i) for i in range(NUM_ADAPTERS)]
    if batch == 1:
        drawn = [[i] for i in range(NUM_ADAPTERS)]
    layer_bytes = adapters.layer_bytes(drawn[0])
    check(adapters, make_segments(adapters, drawn[0]), num_layers - 1)
    num_sets = min(NUM_ADAPTERS, -(-COLD_BYTES // (layer_bytes * num_layers)))
    shrinks, expands = [], []
    for slots in drawn[:num_sets]:
        segments = make_segments(adapters, slots)
        for layer in range(num_layers):
            some, others = layer_calls(adapters, segments, layer)
            shrinks += some
            expands += others
    pairs = [call for pair in zip(shrinks, expands, strict=True) for call in pair]
    # Two launches of each kind a layer.
    us = {
        "shrink": 2 * graph_time_us(shrinks),
        "expand": 2 * graph_time_us(expands),
        "layer": 4 * graph_time_us(pairs),
    }
    return {
        "batch": batch,
        "popularity": popularity,
        **{f"{name}_us": round(value, 2) for name, value in us.items()},
        "weight_mb": round(layer_bytes / 1e6, 2),
        "tb_per_s": round(layer_bytes / us["layer"] / 1e6, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", nargs="+", choices=list(RANKS), default=list(RANKS))
    parser.add_argument("--seed", type=int, default=0)
    add_output_option(parser)
    args = parser.parse_args()
    require_cuda()
    device, dtype = torch.device("cuda"), torch.bfloat16
    copy = copy_bandwidth()
    print(f"copy {copy / 1e12:.2f} TB/s", file=sys.stderr)
    for name in args.ranks:
        adapters = make_adapters(SHAPES["llama-7b"], RANKS[name], device, dtype, args.seed)
        for batch, popularity in CASES:
            try:
                figures = measure(adapters, batch, popularity, args.seed)
            except AssertionError as error:
                sys.exit(f"no report: ranks {name}, batch {batch}, {popularity}: {error}")
            figures["of_copy"] = round(figures["tb_per_s"] * 1e12 / copy, 3)
            row = {"ranks": name, **figures, "copy_tb_per_s": round(copy / 1e12, 3)}
            config = {"shape": "llama-7b", "dtype": "bfloat16", "num_adapters": NUM_ADAPTERS}
            publish(make_row("lora_kernels", row, config, args.seed), args.output)
        del adapters
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
