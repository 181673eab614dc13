"""Causal paged attention of chunks of prompts (FlashAttention-2, Dao, 2023).

A program takes one tile of a `PrefillPlan` and one KV head: query rows of all heads of the group
against the request's whole context in the pool, earlier chunks and shared prefixes included.
`torch_ops.paged_prefill` says what it computes.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.attention_launch import AttentionLaunch, padded_head_dim, prefill_launches
from kernels.attention_plan import PrefillPlan, plan_prefill, prefill_block_rows
from kernels.paged_tile import Context, Queries, attend_tile, empty_softmax

# Arguments that vary from step to step: nothing may be compiled anew while serving.
VARYING_POINTERS = [
    "query_indptr_ptr",
    "block_tables_ptr",
    "context_lens_ptr",
    "tile_requests_ptr",
    "tile_starts_ptr",
]


def paged_prefill(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    query_indptr: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    sm_scale: float,
    plan: PrefillPlan | None = None,
    out: torch.Tensor | None = None,
    *,
    launch: AttentionLaunch | None = None,
) -> torch.Tensor:
    """Causal attention of chunks of prompts over their paged context.

    Row i of request p sits at position context_lens[p] - num_rows(p) + i and sees all up to it.

    Args:
        q: [rows, num_heads, head_dim], head_dim contiguous; request p has rows
            [query_indptr[p], query_indptr[p + 1]). Other rows, before the first request's and
            after the last one's, are not read, and of their output nothing is written.
        query_indptr: int32 [num_requests + 1].
        block_tables: int32 [num_requests, max_pages]; entries past the context are ignored.
        context_lens: int32 [num_requests], the chunk's own tokens included.
        plan: of these chunks, on q's device. Without one, the lengths are copied to the host to
            plan here.
        out: where to write, contiguous; without one, in a new tensor.
        launch: instead of what `prefill_launches` has for the plan's tiles.

    Returns:
        out [rows, num_heads, head_dim]
    """
    num_heads, head_dim = q.shape[1:]
    page_tokens, num_kv_heads = kv_cache.shape[3:5]
    group = num_heads // num_kv_heads
    launches = prefill_launches(head_dim, q.dtype)
    if plan is None:
        bounds = query_indptr.tolist()
        chunk_lens = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
        block_rows = prefill_block_rows(chunk_lens, num_heads, num_kv_heads, max(launches))
        plan = plan_prefill(chunk_lens, context_lens.tolist(), group, block_rows).to(q.device)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert out.is_contiguous() and out.shape == q.shape, "out is contiguous, of q's shape"
    num_tiles = plan.tile_requests.shape[0]
    if not num_tiles:
        return out
    launch = launch or launches[plan.block_rows]
    # A view of the layer, because a layer index among the arguments is compiled for 1 and for 16.
    kv_layer = kv_cache[:, layer]
    page_stride, value_stride, token_stride, head_stride, _ = kv_layer.stride()
    # Tiles run fastest: those of one request and head share its KV in the L2 cache.
    _prefill_kernel[(num_tiles, num_kv_heads)](
        q,
        kv_layer,
        out,
        query_indptr,
        block_tables,
        context_lens,
        plan.tile_requests,
        plan.tile_starts,
        sm_scale / math.log(2),
        num_heads,
        group,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        page_stride,
        value_stride,
        token_stride,
        head_stride,
        PAGE_TOKENS=page_tokens,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_ROWS=plan.block_rows,
        BLOCK_TOKENS=launch.block_tokens,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out


@triton.jit(
    do_not_specialize=["num_heads", "group", "table_stride"],
    do_not_specialize_on_alignment=VARYING_POINTERS,
)
def _prefill_kernel(
    q_ptr,
    kv_ptr,
    out_ptr,
    query_indptr_ptr,
    block_tables_ptr,
    context_lens_ptr,
    tile_requests_ptr,
    tile_starts_ptr,
    qk_scale,
    num_heads,
    group,
    q_row_stride,
    q_head_stride,
    table_stride,
    page_stride,
    value_stride,
    token_stride,
    head_stride,
    PAGE_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One tile of packed query rows and one KV head. `out` is contiguous."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = tl.load(tile_requests_ptr + tile).to(tl.int64)
    if request < 0:
        return
    tile_start = tl.load(tile_starts_ptr + tile)
    first_row = tl.load(query_indptr_ptr + request).to(tl.int64)
    num_rows = (tl.load(query_indptr_ptr + request + 1) - first_row).to(tl.int32)
    num_cached = tl.load(context_lens_ptr + request) - num_rows

    packed = tile_start + tl.arange(0, BLOCK_ROWS)  # [M]
    chunk_rows = packed // group
    heads = kv_head * group + packed % group
    rows = first_row + chunk_rows
    dims = tl.arange(0, BLOCK_D)  # [D]
    mask = (chunk_rows[:, None] < num_rows) & (dims[None, :] < HEAD_DIM)
    q_ptrs = q_ptr + rows[:, None] * q_row_stride + heads[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0)  # [M, D]

    last_chunk_row = tl.minimum((tile_start + BLOCK_ROWS - 1) // group, num_rows - 1)
    num_tokens = num_cached + last_chunk_row + 1
    # Whole tiles that the first row sees, and with it all others.
    num_unmasked = (num_cached + tile_start // group + 1) // BLOCK_TOKENS * BLOCK_TOKENS
    queries = Queries(q=q, last_visible=num_cached + chunk_rows, qk_scale=qk_scale)
    context = Context(
        kv_head_ptr=kv_ptr + kv_head * head_stride,
        table_ptr=block_tables_ptr + request * table_stride,
        num_tokens=num_tokens,
        page_tokens=PAGE_TOKENS,
        page_stride=page_stride,
        value_stride=value_stride,
        token_stride=token_stride,
    )
    softmax = empty_softmax(BLOCK_ROWS, BLOCK_D)
    for first_token in range(0, num_unmasked, BLOCK_TOKENS):
        softmax = attend_tile(
            softmax, queries, context, first_token, HEAD_DIM, BLOCK_TOKENS, MASKED=False
        )
    for first_token in range(num_unmasked, num_tokens, BLOCK_TOKENS):
        softmax = attend_tile(
            softmax, queries, context, first_token, HEAD_DIM, BLOCK_TOKENS, MASKED=True
        )
    offsets = (rows * num_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
    out = (softmax.acc / softmax.row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, out, mask=mask)
