"""Batches that the attention kernels are measured on, and their inputs in a pool of real size.

Of the kernels it knows only the arguments; `bench_attention` measures them.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from kernels import torch_ops
from kernels.attention_launch import AttentionLaunch, prefill_launches
from kernels.attention_plan import (
    DecodePlan,
    PrefillPlan,
    max_decode_items,
    plan_decode,
    plan_prefill,
    prefill_block_rows,
)
from kernels.paged_decode import paged_decode
from kernels.paged_prefill import paged_prefill
from tests.kernels.cases import assert_close

PAGE_TOKENS = 16
MAX_LAYERS = 32
# What a graph's calls read in turn, at least: four times the L2 cache of an H100.
COLD_BYTES = 200e6
# Scores of a standard deviation of 4: few tokens then count, and outputs are of order 1. Under
# even weights they would be near 0, and any tolerance would do.
QUERY_SCALE = 4.0


@dataclass(frozen=True)
class AttentionCase:
    """One batch: decode rows, or prefill chunks where `chunk_lens` is not empty."""

    name: str
    num_heads: int
    num_kv_heads: int
    context_lens: tuple[int, ...]
    chunk_lens: tuple[int, ...] = ()
    head_dim: int = 128

    @property
    def kv_bytes(self) -> int:
        """KV that one call must read, of two bytes an element."""
        return 4 * sum(self.context_lens) * self.num_kv_heads * self.head_dim

    @property
    def flops(self) -> int:
        """Multiplications and additions of q.K and p.V under the causal mask."""
        chunk_lens = self.chunk_lens or (1,) * len(self.context_lens)
        visible = sum(
            rows * context - rows * (rows - 1) // 2
            for rows, context in zip(chunk_lens, self.context_lens, strict=True)
        )
        return 4 * visible * self.num_heads * self.head_dim


def standard_cases(seed: int) -> list[AttentionCase]:
    """Decode and prefill batches, each with 32 KV heads and with 8."""
    draw = random.Random(seed)
    decodes = {
        "decode 64 x 1024": (1024,) * 64,
        "decode 8 x 16384": (16384,) * 8,
        "decode 64 x U[1, 2048]": tuple(draw.randint(1, 2048) for _ in range(64)),
        "decode 1 x 2048": (2048,),
        "decode 128 x 576": (576,) * 128,
    }
    prefills = {
        "prefill 16 x 512": ((512,) * 16, (512,) * 16),
        "prefill 1 x 8192": ((8192,), (8192,)),
        "prefill 256 after 2048": ((2304,), (256,)),
    }
    cases = [
        AttentionCase(f"{name}, {num_kv_heads} KV heads", 32, num_kv_heads, lens)
        for name, lens in decodes.items()
        for num_kv_heads in (32, 8)
    ]
    return cases + [
        AttentionCase(f"{name}, {num_kv_heads} KV heads", 32, num_kv_heads, lens, chunks)
        for name, (lens, chunks) in prefills.items()
        for num_kv_heads in (32, 8)
    ]


@dataclass(frozen=True)
class AttentionInputs:
    """The arguments of both ops for a case, but for the layer."""

    case: AttentionCase
    q: torch.Tensor
    kv_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_indptr: torch.Tensor
    plan: DecodePlan | PrefillPlan

    def layers(self) -> list[int]:
        """As many layers as make the L2 cache cold, spread over all."""
        num_layers = self.kv_cache.shape[1]
        count = min(num_layers, max(4, round(COLD_BYTES / self.case.kv_bytes)))
        return [i * num_layers // count for i in range(count)]

    def attend(self, layer: int, launch: AttentionLaunch | None = None) -> torch.Tensor:
        lengths = (self.block_tables, self.context_lens, self.case.head_dim**-0.5, self.plan)
        if self.case.chunk_lens:
            return paged_prefill(
                self.q, self.kv_cache, layer, self.query_indptr, *lengths, launch=launch
            )
        return paged_decode(self.q, self.kv_cache, layer, *lengths, launch=launch)

    def calls(self, launch: AttentionLaunch | None = None) -> list[Callable[[], torch.Tensor]]:
        """One call a layer of `layers()`."""
        return [lambda layer=layer: self.attend(layer, launch) for layer in self.layers()]

    def twin(self, layer: int) -> torch.Tensor:
        lengths = (self.block_tables, self.context_lens, self.case.head_dim**-0.5)
        if self.case.chunk_lens:
            return torch_ops.paged_prefill(
                self.q, self.kv_cache, layer, self.query_indptr, *lengths
            )
        return torch_ops.paged_decode(self.q, self.kv_cache, layer, *lengths)

    def check(self) -> None:
        """Compare with the twin; raises AssertionError where they differ."""
        layer = self.layers()[-1]
        assert_close(self.attend(layer), self.twin(layer).double(), self.q.dtype)

    def with_decode_plan(self, max_items: int, min_chunk_tokens: int) -> "AttentionInputs":
        plan = plan_decode(self.case.context_lens, max_items, min_chunk_tokens)
        return replace(self, plan=plan.to(self.q.device))

    def with_prefill_plan(self, block_rows: int) -> "AttentionInputs":
        case = self.case
        group = case.num_heads // case.num_kv_heads
        plan = plan_prefill(case.chunk_lens, case.context_lens, group, block_rows)
        return replace(self, plan=plan.to(self.q.device))


def make_inputs(pool: torch.Tensor, case: AttentionCase, seed: int) -> AttentionInputs:
    """Pages in random order over a flat pool of KV, in as many layers as it has room for."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // PAGE_TOKENS) for length in case.context_lens]
    num_pages = sum(counts)
    page_elems = 2 * PAGE_TOKENS * case.num_kv_heads * case.head_dim
    num_layers = min(MAX_LAYERS, pool.numel() // (num_pages * page_elems))
    if not num_layers:
        raise ValueError(f"{case.name} does not fit a pool of {pool.numel()} elements")
    kv_cache = pool[: num_pages * num_layers * page_elems].view(
        num_pages, num_layers, 2, PAGE_TOKENS, case.num_kv_heads, case.head_dim
    )
    page_ids = torch.randperm(num_pages, generator=generator, dtype=torch.int32)
    block_tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for row, ids in enumerate(page_ids.split(counts)):
        block_tables[row, : len(ids)] = ids
    chunk_lens = case.chunk_lens or (1,) * len(counts)
    bounds = [sum(chunk_lens[:p]) for p in range(len(chunk_lens) + 1)]
    q = torch.randn(bounds[-1], case.num_heads, case.head_dim, generator=generator) * QUERY_SCALE
    device = pool.device
    return AttentionInputs(
        case,
        q.to(device, pool.dtype),
        kv_cache,
        block_tables.to(device),
        torch.tensor(case.context_lens, dtype=torch.int32, device=device),
        torch.tensor(bounds, dtype=torch.int32, device=device),
        _default_plan(case, pool),
    )


def _default_plan(case: AttentionCase, pool: torch.Tensor) -> DecodePlan | PrefillPlan:
    if not case.chunk_lens:
        max_items = max_decode_items(len(case.context_lens), case.num_kv_heads)
        return plan_decode(case.context_lens, max_items).to(pool.device)
    block_rows = prefill_block_rows(
        case.chunk_lens,
        case.num_heads,
        case.num_kv_heads,
        max(prefill_launches(case.head_dim, pool.dtype)),
    )
    group = case.num_heads // case.num_kv_heads
    plan = plan_prefill(case.chunk_lens, case.context_lens, group, block_rows)
    return plan.to(pool.device)
