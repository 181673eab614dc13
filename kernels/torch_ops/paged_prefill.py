"""Causal attention of chunks of prompts, a request at a time."""

import torch
import torch.nn.functional as F

from kernels.attention_plan import PrefillPlan
from kernels.torch_ops.paged_kv import gather_kv


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
) -> torch.Tensor:
    """Causal attention of chunks of prompts over their paged context.

    Row i of request p sits at position context_lens[p] - num_rows(p) + i and sees all up to it.

    Args:
        q: [rows, num_heads, head_dim]; request p has rows [query_indptr[p], query_indptr[p + 1]).
            Other rows, before the first request's and after the last one's, are not read, and of
            their output nothing is written.
        block_tables: int32 [num_requests, max_pages].
        context_lens: int32 [num_requests], the chunk's own tokens included.
        plan: how kernels divide the work; ignored.
        out: where to write; without one, in a new tensor.

    Returns:
        out [rows, num_heads, head_dim]
    """
    _, num_heads, head_dim = q.shape
    page_tokens, num_kv_heads = kv_cache.shape[3:5]
    group = num_heads // num_kv_heads
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    bounds = query_indptr.tolist()
    for p, context_len in enumerate(context_lens.tolist()):
        start, end = bounds[p], bounds[p + 1]
        num_rows = end - start
        num_pages = -(-context_len // page_tokens)
        keys, values = gather_kv(kv_cache, layer, block_tables[p : p + 1, :num_pages])
        keys, values = keys[:, :context_len], values[:, :context_len]
        positions = torch.arange(context_len - num_rows, context_len, device=q.device)
        causal = torch.arange(context_len, device=q.device) <= positions.unsqueeze(1)
        # [1, num_kv_heads, group * num_rows, head_dim]
        grouped = q[start:end].view(num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        attended = F.scaled_dot_product_attention(
            grouped.reshape(1, num_kv_heads, group * num_rows, head_dim),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=causal.repeat(group, 1),
            scale=sm_scale,
        )
        attended = attended.view(num_kv_heads, group, num_rows, head_dim).permute(2, 0, 1, 3)
        out[start:end] = attended.reshape(num_rows, num_heads, head_dim)
    return out
