"""How a step's attention is cut into programs: items of decode rows, tiles of prefill rows.

Planned on the host once a step from plain lengths and read by every layer's kernels. It knows no
KV and no Triton; the twins in `torch_ops` ignore it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

# Chunks are multiples of this, so that no token tile of up to 64 is cut by a chunk's end.
CHUNK_STEP = 64
# Below this, starting a program costs more than sharing a row between two saves. It binds for
# batches of few rows only.
MIN_CHUNK_TOKENS = 128
# Programs beyond one a row and KV head that splitting may add, and that fill a large GPU.
SPLIT_PROGRAMS = 512
# Prefill tiles are halved until there are as many programs as multiprocessors, about.
MIN_PREFILL_PROGRAMS = 128
MIN_BLOCK_ROWS = 32


@dataclass(frozen=True)
class DecodePlan:
    """Items, runs of at most `chunk_tokens` tokens of one decode row each: a program a KV head.

    Item i holds tokens [item_starts[i], item_starts[i] + chunk_tokens) of row `item_rows[i]`, as
    far as the row's context goes. Items are in order of falling length, so that the last programs
    to start are the short ones. A row of one item needs no more; the j-th item of a row of several
    leaves its part of the softmax in place row_items[row] + j of the workspace. Shapes depend on
    the batch size alone: a captured CUDA graph reads new contents from the same tensors.
    """

    # int32 [max_items]; -1 is an unused entry. The used ones come first.
    item_rows: torch.Tensor
    # int32 [max_items]: first token, a multiple of chunk_tokens.
    item_starts: torch.Tensor
    # int32 [num_decodes + 1]: row d has row_items[d + 1] - row_items[d] items.
    row_items: torch.Tensor
    # int32 [1]
    chunk_tokens: torch.Tensor

    @property
    def max_items(self) -> int:
        return self.item_rows.shape[0]

    def to(self, device: torch.device) -> Self:
        return type(self)(
            self.item_rows.to(device),
            self.item_starts.to(device),
            self.row_items.to(device),
            self.chunk_tokens.to(device),
        )


def max_decode_items(num_decodes: int, num_kv_heads: int) -> int:
    """Items to provide for a batch of this many rows: one each, and what fills the GPU."""
    return num_decodes + -(-SPLIT_PROGRAMS // num_kv_heads)


def plan_decode(
    context_lens: Sequence[int], max_items: int, min_chunk_tokens: int = MIN_CHUNK_TOKENS
) -> DecodePlan:
    """Cut contexts into equal chunks, on the CPU, so that the spare items fill the GPU.

    chunk = sum(context_lens) / (max_items - num_rows), rounded up to a multiple of CHUNK_STEP and
    at least `min_chunk_tokens`: then sum(ceil(context_lens / chunk)) <= max_items. Where rows
    alone fill the GPU, this splits only the rows that are much longer than others, since parts
    cost a second pass.

    Args:
        context_lens: of each decode row; 0 is a row that only pads the batch and has no items.
        max_items: at least the number of rows.
    """
    num_decodes = len(context_lens)
    assert max_items >= num_decodes, f"{max_items} items for {num_decodes} rows"
    lens = torch.tensor(context_lens, dtype=torch.int64)
    chunk = _chunk_tokens(lens, max_items, min_chunk_tokens)
    counts = _ceil_div(lens, chunk)
    row_items = torch.zeros(num_decodes + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=row_items[1:])
    rows = torch.repeat_interleave(torch.arange(num_decodes), counts)
    starts = (torch.arange(rows.shape[0]) - row_items[rows]) * chunk
    item_lens = (lens[rows] - starts).clamp_(max=chunk)
    order = item_lens.argsort(descending=True, stable=True)
    item_rows = torch.full((max_items,), -1, dtype=torch.int32)
    item_starts = torch.zeros(max_items, dtype=torch.int32)
    item_rows[: rows.shape[0]] = rows[order]
    item_starts[: rows.shape[0]] = starts[order]
    return DecodePlan(
        item_rows, item_starts, row_items.int(), torch.tensor([chunk], dtype=torch.int32)
    )


def _chunk_tokens(lens: torch.Tensor, max_items: int, min_chunk_tokens: int) -> int:
    num_spare = max_items - lens.shape[0]
    wanted = -(-int(lens.sum()) // num_spare) if num_spare else max(lens.tolist(), default=0)
    return -(-max(wanted, min_chunk_tokens) // CHUNK_STEP) * CHUNK_STEP


def _ceil_div(x: torch.Tensor, divisor: int) -> torch.Tensor:
    return (x + (divisor - 1)) // divisor


@dataclass(frozen=True)
class PrefillPlan:
    """Tiles of `block_rows` packed query rows of one request: a program a KV head each.

    The query heads of a KV head are packed token-major: packed row m of a request is head
    m % group of the group, of token m // group of the request's chunk. A tile may start and end
    within a token. Tiles that see most tokens come first.
    """

    # int32 [num_tiles]; -1 is an unused entry, which a captured CUDA graph has.
    tile_requests: torch.Tensor
    # int32 [num_tiles]: first packed row within the request, a multiple of block_rows.
    tile_starts: torch.Tensor
    # 16, 32, 64 or 128.
    block_rows: int

    def to(self, device: torch.device) -> Self:
        return type(self)(
            self.tile_requests.to(device), self.tile_starts.to(device), self.block_rows
        )


def plan_prefill(
    chunk_lens: Sequence[int], context_lens: Sequence[int], group: int, block_rows: int
) -> PrefillPlan:
    """Cut the chunks of a step into exact tiles, on the CPU.

    Args:
        chunk_lens: rows of each request in this step.
        context_lens: tokens of each request, the chunk's own included.
        group: query heads a KV head.
        block_rows: packed rows a tile; see `prefill_block_rows`.
    """
    tiles = sorted(
        # A tile's work is the last token it sees.
        (context_len - chunk_len + min((start + block_rows - 1) // group + 1, chunk_len), p, start)
        for p, (chunk_len, context_len) in enumerate(zip(chunk_lens, context_lens, strict=True))
        for start in range(0, chunk_len * group, block_rows)
    )
    tiles.reverse()
    return PrefillPlan(
        torch.tensor([request for _, request, _ in tiles], dtype=torch.int32),
        torch.tensor([start for _, _, start in tiles], dtype=torch.int32),
        block_rows,
    )


def prefill_block_rows(
    chunk_lens: Sequence[int], num_heads: int, num_kv_heads: int, max_block_rows: int
) -> int:
    """The largest tile that leaves no multiprocessors idle.

    `max_block_rows` is the largest that `attention_launch.prefill_launches` has.
    """
    group = num_heads // num_kv_heads
    block_rows = max_block_rows
    while block_rows > MIN_BLOCK_ROWS:
        num_tiles = sum(-(-chunk_len * group // block_rows) for chunk_len in chunk_lens)
        if num_tiles * num_kv_heads >= MIN_PREFILL_PROGRAMS:
            break
        block_rows //= 2
    return block_rows
