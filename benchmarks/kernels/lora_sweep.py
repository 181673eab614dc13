"""Tries launch parameters of decode steps' LoRA kernels for `bench_lora_kernels --sweep`.

A layer's q, k, v and o by each launch of `lora_shrink` and of `lora_expand`, and SiLU-mul with
deltas by each of `lora_silu_mul`. A variant that fails, or is wrong, is a line with its error and
ends nothing.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.kernels.attention_sweep import describe
from benchmarks.kernels.gpu_timer import graph_time_us
from benchmarks.kernels.lora_cases import (
    Adapters,
    Calls,
    check_layer,
    check_silu,
    layer_calls,
    make_adapters,
    make_segments,
    silu_call,
)
from benchmarks.lora_targets import ATTENTION, MLP
from kernels.launch_configs import ExpandLaunch, ShrinkLaunch, expand_launch, shrink_launch
from kernels.lora_segments import DECODE_BLOCK_ROWS, LoraSegments
from slora_core.models.config import ModelConfig

BATCH = 64
# So many layers, and adapters of which each in turn has all rows, make the L2 cache cold.
NUM_LAYERS = 8
NUM_IDENTICAL = 16
# Parts, columns at a time and warps; columns of a program, at a time and warps.
SHRINKS = ((8, 512, 2), (8, 512, 4), (8, 512, 8), (4, 1024, 4), (16, 256, 4))
EXPANDS = tuple(itertools.product((512, 1024), (64, 128), (1, 2, 4)))

# Batches and layers to run in turn.
Places = Sequence[tuple[LoraSegments, int]]


def sweep(
    model: ModelConfig,
    ranks: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    time_us: Callable[[Calls], float] = graph_time_us,
) -> None:
    """Print microseconds a layer, fastest first: of an adapter a row, and of one for all rows."""
    model = replace(model, layers=model.layers[:NUM_LAYERS])
    adapters = make_adapters(model, ranks, device, dtype, seed, ATTENTION + MLP)
    batches = {
        "distinct": [list(range(BATCH))],
        "identical": [[slot] * BATCH for slot in range(NUM_IDENTICAL)],
    }
    for popularity, draws in batches.items():
        segments = [make_segments(adapters, slots) for slots in draws]
        places = list(itertools.product(segments, range(NUM_LAYERS)))
        times: list[tuple[float, str]] = []
        for name, make in _tries(max(ranks), model.hidden_size).items():
            try:
                times.append((time_us(make(adapters, places)), name))
            except Exception as error:
                print(f"{popularity}  {name}: {describe(error)}")
        for us, name in sorted(times):
            print(f"ranks {tuple(ranks)}  {popularity:<10}{name:<44}{us:8.2f}", flush=True)


def _tries(max_rank: int, in_features: int) -> dict[str, Callable[[Adapters, Places], Calls]]:
    """What makes the calls of each variant."""
    shrink = shrink_launch(BATCH, DECODE_BLOCK_ROWS, 3, max_rank, in_features)
    expand = expand_launch(DECODE_BLOCK_ROWS, max_rank)
    tries: dict[str, Callable[[Adapters, Places], Calls]] = {}
    for splits, columns, warps in SHRINKS:
        launch = replace(shrink, num_splits=splits, row_block_k=columns, num_warps=warps)
        name = f"shrink {splits} parts, {columns} columns, {warps} warps"
        tries[name] = partial(_layers, shrink=launch)
    for columns, turn, warps in EXPANDS:
        other = replace(expand, block_n=columns, dot_block_n=turn, num_warps=warps)
        name = f"{columns} columns, {turn} a turn, {warps} warps"
        tries["expand " + name] = partial(_layers, expand=other)
        tries["silu_mul " + name] = partial(_silu_muls, launch=other)
    return tries


def _layers(
    adapters: Adapters,
    places: Places,
    shrink: ShrinkLaunch | None = None,
    expand: ExpandLaunch | None = None,
) -> Calls:
    """A call a layer, of q, k, v and then of o; compared with the twins in one place."""
    check_layer(adapters, *places[0], shrink, expand)
    pairs = [
        layer_calls(adapters, segments, layer, shrink, expand)["both"] for segments, layer in places
    ]
    return [partial(_all, pair) for pair in pairs]


def _silu_muls(adapters: Adapters, places: Places, launch: ExpandLaunch) -> Calls:
    """A call a layer; compared with the twins in one place."""
    check_silu(adapters, *places[0], launch)
    return [silu_call(adapters, segments, layer, launch) for segments, layer in places]


def _all(calls: Calls) -> None:
    for call in calls:
        call()
