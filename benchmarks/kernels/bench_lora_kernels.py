"""LoRA kernels on one GPU: bandwidth on weights that must move in decodes, time added to prefills.

`python -m benchmarks.kernels.bench_lora_kernels`: shrink and expand of q, k, v and of o of a
Llama-7B's layers, adapters on randomly scattered pages of a unified pool, and a layer over prompts
without and with an adapter. Every case is first compared with the torch twins; where they differ
there is no report. Calls run inside CUDA graphs over layers and adapters in turn, so that the L2
cache is cold.
"""

import argparse
import sys
from collections import defaultdict
from typing import Any

import torch

from benchmarks.engine.workloads import SHAPES
from benchmarks.kernels.gpu_timer import copy_bandwidth, graph_time_us, require_cuda
from benchmarks.kernels.lora_cases import (
    NUM_ADAPTERS,
    TOLERANCE,
    Adapters,
    Calls,
    check_layer,
    layer_calls,
    make_adapters,
    make_segments,
)
from benchmarks.kernels.lora_prefill import check_prefill, make_prefill
from benchmarks.kernels.lora_sweep import sweep
from benchmarks.report import add_output_option, make_row, publish
from kernels import torch_ops, triton_ops
from tests.popularity import draw_adapters

RANKS = {"8": (8,), "64": (64,), "64/32/16/8": (64, 32, 16, 8)}
# Popularity of adapters by batch size; one row uses every adapter in turn.
CASES = [(1, "distinct")]
CASES += [
    (batch, pattern)
    for batch in (32, 64)
    for pattern in ("identical", "distinct", "uniform", "zipf")
]
# What a graph's calls read at least, several times the L2 cache.
COLD_BYTES = 400 * 10**6
# Of the prefill: as many rows as a step of the engine has at most.
NUM_PROMPTS, PROMPT_LEN, PREFILL_RANK = 16, 512, 16


def measure(adapters: Adapters, batch: int, popularity: str, seed: int) -> dict[str, Any]:
    """us of a layer's four launches, and bandwidth on its weights."""
    num_layers = adapters.model.num_layers
    drawn = [draw_adapters(popularity, batch, NUM_ADAPTERS, seed + i) for i in range(NUM_ADAPTERS)]
    if batch == 1:
        drawn = [[i] for i in range(NUM_ADAPTERS)]
    check_layer(adapters, make_segments(adapters, drawn[0]), num_layers - 1)
    num_sets = -(-COLD_BYTES // (adapters.layer_bytes(drawn[0]) * num_layers))
    drawn = drawn[:num_sets]
    layer_bytes = sum(adapters.layer_bytes(slots) for slots in drawn) / len(drawn)
    calls: dict[str, Calls] = defaultdict(list)
    for slots in drawn:
        segments = make_segments(adapters, slots)
        for layer in range(num_layers):
            for kind, some in layer_calls(adapters, segments, layer).items():
                calls[kind] += some
    # A layer has two of each kind.
    us = {kind: 2 * graph_time_us(some) for kind, some in calls.items()}
    return {
        "batch": batch,
        "popularity": popularity,
        "shrink_us": round(us["shrink"], 2),
        "expand_us": round(us["expand"], 2),
        "layer_us": round(us["both"], 2),
        "weight_mb": round(layer_bytes / 1e6, 2),
        "tb_per_s": round(layer_bytes / us["both"] / 1e6, 3),
    }


def measure_prefill(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """us of a layer over prompts, of the base model and of one adapter on all seven linears."""
    shape = SHAPES["llama-7b"]
    inputs = make_prefill(shape, NUM_PROMPTS, PROMPT_LEN, PREFILL_RANK, device, dtype, seed)
    check_prefill(inputs, (triton_ops, torch_ops), TOLERANCE)
    base, lora = (graph_time_us(inputs.calls(triton_ops, with_lora)) for with_lora in (False, True))
    return {
        "num_prompts": NUM_PROMPTS,
        "prompt_len": PROMPT_LEN,
        "rank": PREFILL_RANK,
        "base_layer_us": round(base, 1),
        "lora_layer_us": round(lora, 1),
        "added": round(lora / base - 1, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", nargs="*", choices=list(RANKS), default=list(RANKS))
    parser.add_argument("--no-prefill", action="store_true", help="decode steps only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep", action="store_true", help="try launch parameters instead")
    add_output_option(parser)
    args = parser.parse_args()
    require_cuda()
    device, dtype = torch.device("cuda"), torch.bfloat16
    if args.sweep:
        for name in args.ranks:
            sweep(SHAPES["llama-7b"], RANKS[name], device, dtype, args.seed)
        return
    copy = copy_bandwidth()
    print(f"copy {copy / 1e12:.2f} TB/s", file=sys.stderr)
    config = {"shape": "llama-7b", "dtype": "bfloat16"}
    for name in args.ranks:
        adapters = make_adapters(SHAPES["llama-7b"], RANKS[name], device, dtype, args.seed)
        for batch, popularity in CASES:
            try:
                figures = measure(adapters, batch, popularity, args.seed)
            except AssertionError as error:
                sys.exit(f"no report: ranks {name}, batch {batch}, {popularity}: {error}")
            figures["of_copy"] = round(figures["tb_per_s"] * 1e12 / copy, 3)
            row = {"ranks": name, **figures, "copy_tb_per_s": round(copy / 1e12, 3)}
            row_config = {**config, "num_adapters": NUM_ADAPTERS}
            publish(make_row("lora_kernels", row, row_config, args.seed), args.output)
        del adapters
        torch.cuda.empty_cache()
    if not args.no_prefill:
        try:
            figures = measure_prefill(device, dtype, args.seed)
        except AssertionError as error:
            sys.exit(f"no report: {error}")
        publish(make_row("lora_prefill", figures, config, args.seed), args.output)


if __name__ == "__main__":
    main()
