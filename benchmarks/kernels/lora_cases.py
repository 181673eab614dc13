"""Adapters and decode batches that the LoRA kernels are measured on, in a pool of real size.

`bench_lora_kernels` and its sweep measure them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.engine.dummy_adapters import ADAPTER_STD, uniform_layout
from benchmarks.kernels.compare import assert_near
from benchmarks.lora_targets import ATTENTION
from kernels import torch_ops, triton_ops
from kernels.launch_configs import ExpandLaunch, ShrinkLaunch
from kernels.lora_segments import DECODE_BLOCK_ROWS, LoraSegments, LoraTiles, plan_tiles
from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.config import EngineConfig
from slora_core.dtypes import dtype_name
from slora_core.execution.buckets import RANK_BUCKETS, bucket_of
from slora_core.layers.lora import lora_groups
from slora_core.models.config import GATE_UP, O_PROJ, QKV, ModelConfig

NUM_ADAPTERS = 64
GROUPS = (QKV, O_PROJ)
# Largest difference from the twins, relative to the norm, in bf16.
TOLERANCE = 2e-2

Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Adapters:
    """All adapters of one rank pattern, resident in a pool."""

    model: ModelConfig
    # Indices of those that have weights.
    modules: frozenset[int]
    pool: torch.Tensor
    page_tables: torch.Tensor
    offsets: torch.Tensor
    scaling: torch.Tensor
    ranks: list[int]

    def layer_bytes(self, slots: Sequence[int]) -> int:
        """Of the weights that these adapters have in one layer."""
        dims = self.model.module_dims[0]
        elems = sum(sum(dims[module] or ()) for module in self.modules)
        return sum(self.ranks[slot] for slot in set(slots)) * elems * self.pool.element_size()


def make_adapters(
    model: ModelConfig,
    ranks: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    modules: tuple[str, ...] = ATTENTION,
) -> Adapters:
    """Adapter i has rank `ranks[i % len(ranks)]` on `modules`, and random weights."""
    geometry = AdapterGeometry.of(model, EngineConfig(dtype=dtype_name(dtype)))
    of_rank = {rank: uniform_layout(geometry, modules, rank) for rank in ranks}
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
        layouts[0].modules,
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
    num_tiles = len(ordered)
    return LoraSegments(
        seg_indptr=torch.tensor(indptr, dtype=torch.int32, device=device),
        seg_slots=torch.tensor(seg_slots, dtype=torch.int32, device=device),
        page_tables=adapters.page_tables,
        offsets=adapters.offsets,
        scaling=adapters.scaling,
        max_rank=bucket_of(max(adapters.ranks[slot] for slot in ordered), RANK_BUCKETS),
        modules=adapters.modules,
        tiles=LoraTiles.of(tiles, DECODE_BLOCK_ROWS, num_tiles, device),
    )


def layer_calls(
    adapters: Adapters,
    segments: LoraSegments,
    layer: int,
    shrink_launch: ShrinkLaunch | None = None,
    expand_launch: ExpandLaunch | None = None,
) -> dict[str, Calls]:
    """Calls for a layer's q, k, v and for its o, each over tensors of its own.

    "shrink" and "expand" alone, and "both", where expand reads what shrink has just written.
    """
    calls: dict[str, Calls] = {"shrink": [], "expand": [], "both": []}
    for name in GROUPS:
        group = lora_groups(adapters.model, layer)[name]
        x = _random_rows(adapters, segments, adapters.model.hidden_size)
        y = _random_rows(adapters, segments, group.out_offsets[-1])
        args = adapters.pool, layer, group.modules
        bounds = group.out_offsets
        v = triton_ops.lora_shrink(x, *args, segments, launch=shrink_launch)

        def shrink(x=x, args=args) -> torch.Tensor:
            return triton_ops.lora_shrink(x, *args, segments, launch=shrink_launch)

        def expand(v=v, y=y, args=args, bounds=bounds) -> None:
            triton_ops.lora_expand(y, v, *args, bounds, segments, launch=expand_launch)

        def both(shrink=shrink, expand=expand) -> None:
            expand(v=shrink())

        for kind, call in {"shrink": shrink, "expand": expand, "both": both}.items():
            calls[kind].append(call)
    return calls


def silu_call(
    adapters: Adapters, segments: LoraSegments, layer: int, launch: ExpandLaunch | None = None
) -> Callable[[], torch.Tensor]:
    """SiLU-mul with the deltas of gate and up, which the adapters must have."""
    group = lora_groups(adapters.model, layer)[GATE_UP]
    args = adapters.pool, layer, group.modules, segments
    x = _random_rows(adapters, segments, adapters.model.hidden_size)
    gate_up = _random_rows(adapters, segments, group.out_offsets[-1])
    v = triton_ops.lora_shrink(x, *args)
    return lambda: triton_ops.lora_silu_mul(gate_up, v, *args, launch=launch)


def check_layer(
    adapters: Adapters,
    segments: LoraSegments,
    layer: int,
    shrink_launch: ShrinkLaunch | None = None,
    expand_launch: ExpandLaunch | None = None,
) -> None:
    """Raises AssertionError where shrink and expand do not do what their twins do."""
    for name in GROUPS:
        group = lora_groups(adapters.model, layer)[name]
        args = adapters.pool, layer, group.modules
        bounds = group.out_offsets
        x = _random_rows(adapters, segments, adapters.model.hidden_size)
        ours = torch.zeros(len(x), bounds[-1], dtype=x.dtype, device=x.device)
        twins = torch.zeros_like(ours)
        v = triton_ops.lora_shrink(x, *args, segments, launch=shrink_launch)
        triton_ops.lora_expand(ours, v, *args, bounds, segments, launch=expand_launch)
        v = torch_ops.lora_shrink(x, *args, segments)
        torch_ops.lora_expand(twins, v, *args, bounds, segments)
        assert_near(name, ours, twins, TOLERANCE)


def check_silu(
    adapters: Adapters, segments: LoraSegments, layer: int, launch: ExpandLaunch | None = None
) -> None:
    """Raises AssertionError where SiLU-mul with deltas does not do what its twin does."""
    group = lora_groups(adapters.model, layer)[GATE_UP]
    args = adapters.pool, layer, group.modules, segments
    x = _random_rows(adapters, segments, adapters.model.hidden_size)
    gate_up = _random_rows(adapters, segments, group.out_offsets[-1])
    v = triton_ops.lora_shrink(x, *args)
    ours = triton_ops.lora_silu_mul(gate_up.clone(), v, *args, launch=launch)
    twins = torch_ops.lora_silu_mul(gate_up, torch_ops.lora_shrink(x, *args), *args)
    assert_near("silu_mul", ours, twins, TOLERANCE)


def _random_rows(adapters: Adapters, segments: LoraSegments, features: int) -> torch.Tensor:
    """[rows of the segments, features]"""
    pool = adapters.pool
    rows = int(segments.seg_indptr[-1])
    return torch.randn(rows, features, dtype=pool.dtype, device=pool.device)
