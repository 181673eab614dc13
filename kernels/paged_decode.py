"""Paged attention of decode rows, split over the context (Flash-Decoding, Dao et al., 2023).

A program takes one item of a `DecodePlan` and one KV head, with the head's whole group of query
heads, so that every byte of KV is read once. `torch_ops.paged_decode` says what it computes.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.attention_launch import MIN_BLOCK, AttentionLaunch, decode_launch, padded_head_dim
from kernels.attention_plan import DecodePlan, max_decode_items, plan_decode
from kernels.dependent_launch import (
    launch_options,
    let_next_start,
    wait_for_previous,
    wait_without_work,
)
from kernels.paged_tile import Context, Queries, attend_tile, empty_softmax

# Parts of a row that the combining kernel reads at a time.
COMBINE_BLOCK_ITEMS = 16
COMBINE_NUM_WARPS = 4

# Arguments that vary from step to step: nothing may be compiled anew while serving.
VARYING_POINTERS = [
    "block_tables_ptr",
    "context_lens_ptr",
    "item_rows_ptr",
    "item_starts_ptr",
    "row_items_ptr",
    "chunk_tokens_ptr",
]


def paged_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    sm_scale: float,
    plan: DecodePlan | None = None,
    out: torch.Tensor | None = None,
    *,
    launch: AttentionLaunch | None = None,
) -> torch.Tensor:
    """Attention of one query token a request over its paged context.

    out[d, h] = softmax(sm_scale * q[d, h] . K[d, :context_lens[d], h // group]) . V

    Sums in fp32 in an order that the plan fixes: the same input and plan give the same bits.

    Args:
        q: [num_decodes, num_heads, head_dim], head_dim contiguous.
        block_tables: int32 [num_decodes, max_pages]; entries past the context are ignored.
        context_lens: int32 [num_decodes], the query's own token included; 0 for a row that pads
            the batch, of whose output nothing is written.
        plan: of these context lengths, on q's device. Without one, they are copied to the host
            to plan here.
        out: where to write, contiguous; without one, in a new tensor.
        launch: instead of what `decode_launch` gives.

    Returns:
        out [num_decodes, num_heads, head_dim]
    """
    num_decodes, num_heads, head_dim = q.shape
    page_tokens, num_kv_heads = kv_cache.shape[3:5]
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert out.is_contiguous() and out.shape == q.shape, "out is contiguous, of q's shape"
    if not num_decodes:
        return out
    if plan is None:
        max_items = max_decode_items(num_decodes, num_kv_heads)
        plan = plan_decode(context_lens.tolist(), max_items).to(q.device)
    block_d = padded_head_dim(head_dim)
    launch = launch or decode_launch(head_dim, q.dtype)
    group = num_heads // num_kv_heads
    # A view of the layer, because a layer index among the arguments is compiled for 1 and for 16.
    kv_layer = kv_cache[:, layer]
    page_stride, value_stride, token_stride, head_stride, _ = kv_layer.stride()
    parts = torch.empty(plan.max_items, num_heads, head_dim, dtype=torch.float32, device=q.device)
    part_lses = torch.empty(plan.max_items, num_heads, dtype=torch.float32, device=q.device)
    # KV heads run fastest: programs that run together then read neighbouring memory.
    _decode_kernel[(num_kv_heads, plan.max_items)](
        q,
        kv_layer,
        out,
        parts,
        part_lses,
        block_tables,
        context_lens,
        plan.item_rows,
        plan.item_starts,
        plan.row_items,
        plan.chunk_tokens,
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
        BLOCK_D=block_d,
        BLOCK_HEADS=max(MIN_BLOCK, triton.next_power_of_2(group)),
        BLOCK_TOKENS=launch.block_tokens,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **launch_options(q),
    )
    _combine_kernel[(num_heads, num_decodes)](
        out,
        parts,
        part_lses,
        plan.row_items,
        num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_ITEMS=COMBINE_BLOCK_ITEMS,
        num_warps=COMBINE_NUM_WARPS,
        **launch_options(q),
    )
    return out


@triton.jit(
    do_not_specialize=["num_heads", "group", "table_stride"],
    do_not_specialize_on_alignment=VARYING_POINTERS,
)
def _decode_kernel(
    q_ptr,
    kv_ptr,
    out_ptr,
    parts_ptr,
    part_lses_ptr,
    block_tables_ptr,
    context_lens_ptr,
    item_rows_ptr,
    item_starts_ptr,
    row_items_ptr,
    chunk_tokens_ptr,
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
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One item and KV head: to `out` where the row has no other item, else a part of the row.

    A part is the softmax over the item's tokens, fp32 [group, HEAD_DIM], and the log2 of the sum
    that it was divided by. `out` and the parts are contiguous.
    """
    let_next_start(DEPENDENT)
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    row = tl.load(item_rows_ptr + item).to(tl.int64)
    if row < 0:
        wait_without_work(DEPENDENT)
        return
    start = tl.load(item_starts_ptr + item)
    chunk_tokens = tl.load(chunk_tokens_ptr)
    end = tl.minimum(start + chunk_tokens, tl.load(context_lens_ptr + row))
    first_part = tl.load(row_items_ptr + row)
    num_parts = tl.load(row_items_ptr + row + 1) - first_part

    members = tl.arange(0, BLOCK_HEADS)  # [M] of the group, padded
    dims = tl.arange(0, BLOCK_D)  # [D]
    heads = kv_head * group + members
    mask = (members[:, None] < group) & (dims[None, :] < HEAD_DIM)
    wait_for_previous(DEPENDENT)
    q_ptrs = q_ptr + row * q_row_stride + heads[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0)  # [M, D]

    last_visible = tl.zeros([BLOCK_HEADS], dtype=tl.int32) + (end - 1)
    queries = Queries(q=q, last_visible=last_visible, qk_scale=qk_scale)
    context = Context(
        kv_head_ptr=kv_ptr + kv_head * head_stride,
        table_ptr=block_tables_ptr + row * table_stride,
        num_tokens=end,
        page_tokens=PAGE_TOKENS,
        page_stride=page_stride,
        value_stride=value_stride,
        token_stride=token_stride,
    )
    softmax = empty_softmax(BLOCK_HEADS, BLOCK_D)
    for first_token in range(start, end, BLOCK_TOKENS):
        softmax = attend_tile(
            softmax, queries, context, first_token, HEAD_DIM, BLOCK_TOKENS, MASKED=True
        )
    acc = softmax.acc / softmax.row_sum[:, None]

    if num_parts == 1:
        offsets = (row * num_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        part = (first_part + start // chunk_tokens).to(tl.int64)
        part_heads = part * num_heads + heads
        tl.store(parts_ptr + part_heads[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        lses = softmax.row_max + tl.log2(softmax.row_sum)
        tl.store(part_lses_ptr + part_heads, lses, mask=members < group)


@triton.jit(do_not_specialize=["num_heads"], do_not_specialize_on_alignment=["row_items_ptr"])
def _combine_kernel(
    out_ptr,
    parts_ptr,
    part_lses_ptr,
    row_items_ptr,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out[row, head] = the row's parts weighted by exp2 of their log sums, added in order."""
    let_next_start(DEPENDENT)
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    first = tl.load(row_items_ptr + row)
    last = tl.load(row_items_ptr + row + 1)
    if last - first < 2:
        wait_without_work(DEPENDENT)
        return
    wait_for_previous(DEPENDENT)
    dims = tl.arange(0, BLOCK_D)  # [D]
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    total = 0.0
    best = float("-inf")
    for part in range(first, last, BLOCK_ITEMS):
        parts = part + tl.arange(0, BLOCK_ITEMS)  # [I]
        part_heads = parts.to(tl.int64) * num_heads + head
        lses = tl.load(part_lses_ptr + part_heads, mask=parts < last, other=float("-inf"))
        mask = (parts[:, None] < last) & (dims[None, :] < HEAD_DIM)
        outs = tl.load(
            parts_ptr + part_heads[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0
        )  # [I, D]
        new_best = tl.maximum(best, tl.max(lses, 0))
        weights = tl.exp2(lses - new_best)
        rescale = tl.exp2(best - new_best)
        total = total * rescale + tl.sum(weights, 0)
        acc = acc * rescale + tl.sum(outs * weights[:, None], 0)
        best = new_best
    offsets = (row * num_heads + head) * HEAD_DIM + dims
    tl.store(out_ptr + offsets, (acc / total).to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
