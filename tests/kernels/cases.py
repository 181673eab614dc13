"""Inputs for tests of the pool's kernels, with dense copies for an oracle that knows no pages.

Everything a kernel may not read is NaN or infinity: pages nobody owns, the tails of last pages,
the pages that padded block tables point at. Packing follows the documented format of the pool,
not the project's packer, so that the two check each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from kernels.lora_segments import LoraSegments, LoraTiles, plan_tiles
from tests.kernels import naive

ALIGNMENT = 64

# (rtol, atol) against fp64 for outputs of order 1.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (4e-3, 4e-3),
    torch.bfloat16: (3.2e-2, 3.2e-2),
}

# Where Triton kernels run in the tests, and in what: its CPU interpreter multiplies bf16 wrongly.
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if ON_GPU else ())
# Those of the twins' tests, which run on the CPU everywhere.
TWIN_DTYPES = (torch.float32, torch.float16)
# As DTYPES, for tests of many shapes. The interpreter needs seconds for a case and has one code for
# all dtypes: of each kernel one case in 16 bits shows where it rounds. On a GPU code differs.
SHAPE_DTYPES = DTYPES if ON_GPU else DTYPES[:1]


def assert_close(actual: torch.Tensor, expected64: torch.Tensor, dtype: torch.dtype) -> None:
    """Compare with an fp64 oracle under the tolerance of the dtype the op computed in."""
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(actual.double().cpu(), expected64.cpu(), rtol=rtol, atol=atol)


def bits(x: torch.Tensor) -> torch.Tensor:
    """A copy of x's bits as integers, which compare equal where NaNs do not."""
    return x.detach().clone().contiguous().view(torch.uint8)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """NaN with infinities of both signs among them."""
    x = torch.full(shape, torch.nan, dtype=dtype)
    flat = x.view(-1)
    flat[1::3] = torch.inf
    flat[2::7] = -torch.inf
    return x


@dataclass
class PagedCase:
    """A pool with the KV of some requests on scattered pages, and the same KV contiguous."""

    # [num_pages, num_layers, 2, page_tokens, num_kv_heads, head_dim]
    kv_cache: torch.Tensor
    layer: int
    # int32 [num_requests, max_pages], padded with a poisoned page.
    block_tables: torch.Tensor
    # int32 [num_requests]
    context_lens: torch.Tensor
    # Of each request: [context_len, num_kv_heads, head_dim].
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def to(self, device: torch.device) -> Self:
        """The same case with what kernels read on `device`; the dense copies stay."""
        return replace(
            self,
            kv_cache=self.kv_cache.to(device),
            block_tables=self.block_tables.to(device),
            context_lens=self.context_lens.to(device),
        )


def make_paged_case(
    context_lens: Sequence[int],
    *,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    page_tokens: int = 16,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 3,
    extra_columns: int = 0,
    seed: int = 0,
) -> PagedCase:
    """KV of order 1 on pages in random order; `extra_columns` widens the padding of all rows."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page_tokens) for length in context_lens]
    # Page 0 stays poisoned: it is what the engine pads block tables with.
    order = (torch.randperm(sum(counts) + 2, generator=generator) + 1).tolist()
    kv_cache = poisoned(
        sum(counts) + 3, num_layers, 2, page_tokens, num_kv_heads, head_dim, dtype=dtype
    )
    layer = num_layers // 2
    block_tables = torch.zeros(
        len(context_lens), max(counts, default=0) + extra_columns, dtype=torch.int32
    )
    keys, values = [], []
    for row, (length, count) in enumerate(zip(context_lens, counts, strict=True)):
        page_ids = [order.pop() for _ in range(count)]
        block_tables[row, :count] = torch.tensor(page_ids, dtype=torch.int32)
        kv = torch.randn(2, length, num_kv_heads, head_dim, generator=generator).to(dtype)
        for token in range(length):
            kv_cache[page_ids[token // page_tokens], layer, :, token % page_tokens] = kv[:, token]
        keys.append(kv[0])
        values.append(kv[1])
    lens = torch.tensor(context_lens, dtype=torch.int32)
    return PagedCase(kv_cache, layer, block_tables, lens, keys, values)


def attention64(q: torch.Tensor, case: PagedCase, request: int, sm_scale: float) -> torch.Tensor:
    """fp64 attention of the last rows of a request's context."""
    return naive.attention(q, case.keys[request], case.values[request], sm_scale)


@dataclass
class LoraCase:
    """Packed adapters in a poisoned pool, and their dense weights."""

    # [num_pages, num_layers, page_elems]
    pool: torch.Tensor
    segments: LoraSegments
    # The slot of each row, -1 for the base model.
    row_slots: list[int]
    # (slot, layer, module): A [rank, in_features], B [out_features, rank], scaling.
    weights: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor, float]]

    def to(self, device: torch.device) -> Self:
        """The same case with what kernels read on `device`; the dense weights stay."""
        return replace(self, pool=self.pool.to(device), segments=self.segments.to(device))

    def deltas(self, x: torch.Tensor, layer: int, module: int, out_features: int) -> torch.Tensor:
        """fp64 [rows, out_features]: what adapters add to the module's output; 0 where nothing."""
        deltas = torch.zeros(len(self.row_slots), out_features, dtype=torch.float64)
        for row, slot in enumerate(self.row_slots):
            if (slot, layer, module) in self.weights:
                a, b, scaling = self.weights[slot, layer, module]
                v = naive.lora_shrink(x[row], a)
                deltas[row] = naive.lora_expand(deltas[row], v, b, scaling)
        return deltas


def make_lora_case(
    runs: Sequence[tuple[int, int]],
    ranks: Sequence[Sequence[int]],
    module_dims: Sequence[tuple[int, int]],
    *,
    page_elems: int = 1024,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 2,
    block_rows: int | None = None,
    unused_tiles: int = 2,
    max_rank: int | None = None,
    seed: int = 0,
) -> LoraCase:
    """Adapters of `ranks[slot][module]` in every layer (0: absent) on scattered pages.

    `runs` are (slot, number of rows) in the order of rows; deltas of x of order 1 are of order 1.
    Even layers hold the modules as given and odd ones in half the rank, so that a kernel which
    ignores the layer fails. `block_rows` adds tiles of so many rows; `max_rank` is the largest in
    use where it is not given.
    """
    generator = torch.Generator().manual_seed(seed)
    num_slots, num_modules = len(ranks), len(module_dims)
    offsets = torch.zeros(num_slots, num_layers, num_modules, 3, dtype=torch.int32)
    scaling = torch.zeros(num_slots, num_layers, num_modules)
    weights = {}
    streams = []
    for slot in range(num_slots):
        layers = []
        for layer in range(num_layers):
            parts = [torch.empty(0, dtype=dtype)]
            end = 0
            for module, (in_features, out_features) in enumerate(module_dims):
                rank = ranks[slot][module]
                if layer % 2 and rank:
                    rank = -(-rank // 2)
                if not rank:
                    continue
                a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
                b = torch.randn(out_features, rank, generator=generator) / rank**0.5
                scale = 0.5 + torch.rand(1, generator=generator).item()
                a, b = a.to(dtype), b.to(dtype)
                weights[slot, layer, module] = a, b, scale
                packed = [_padded_rows(a), _padded_rows(b.T)]
                offsets[slot, layer, module] = torch.tensor([rank, end, end + len(packed[0])])
                scaling[slot, layer, module] = scale
                end += sum(len(part) for part in packed)
                parts += packed
            layers.append(torch.cat(parts))
        streams.append(layers)
    pool, page_tables = _scatter(streams, page_elems, dtype, generator)
    bounds = [0]
    for _, count in runs:
        bounds.append(bounds[-1] + count)
    slots = [slot for slot, _ in runs]
    tiles = None
    if block_rows is not None:
        entries = plan_tiles(bounds, slots, block_rows)
        tiles = LoraTiles.of(entries, block_rows, len(entries) + unused_tiles)
    if max_rank is None:
        max_rank = max((max(ranks[slot]) for slot in slots if slot >= 0), default=1)
    segments = LoraSegments(
        seg_indptr=torch.tensor(bounds, dtype=torch.int32),
        seg_slots=torch.tensor(slots, dtype=torch.int32),
        page_tables=page_tables,
        offsets=offsets,
        scaling=scaling,
        max_rank=max_rank,
        modules=frozenset(range(num_modules)),
        tiles=tiles,
    )
    row_slots = [slot for slot, count in runs for _ in range(count)]
    return LoraCase(pool, segments, row_slots, weights)


def _padded_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Rows one after the other, each padded to a multiple of ALIGNMENT by what nobody may read."""
    rows, features = matrix.shape
    out = poisoned(rows, -(-features // ALIGNMENT) * ALIGNMENT, dtype=matrix.dtype)
    out[:, :features] = matrix
    return out.view(-1)


def _scatter(
    streams: list[list[torch.Tensor]],
    page_elems: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put each slot's streams of all layers on pages in random order of a poisoned pool."""
    num_layers = len(streams[0])
    counts = [max(-(-len(stream) // page_elems) for stream in layers) for layers in streams]
    order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    pool = poisoned(len(order), num_layers, page_elems, dtype=dtype)
    page_tables = torch.zeros(len(streams), max(counts), dtype=torch.int32)
    for slot, (layers, count) in enumerate(zip(streams, counts, strict=True)):
        page_ids = [order.pop() for _ in range(count)]
        page_tables[slot, :count] = torch.tensor(page_ids, dtype=torch.int32)
        for layer, stream in enumerate(layers):
            for index, piece in enumerate(stream.split(page_elems) if len(stream) else ()):
                pool[page_ids[index], layer, : len(piece)] = piece
    return pool, page_tables
