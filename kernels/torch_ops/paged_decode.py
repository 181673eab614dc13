"""Attention of decode rows, in groups of similar length."""

import torch
import torch.nn.functional as F

from kernels.attention_plan import DecodePlan
from kernels.torch_ops.paged_kv import gather_kv


def paged_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    sm_scale: float,
    plan: DecodePlan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query token a request over its paged context.

    out[d, h] = softmax(sm_scale * q[d, h] . K[d, :context_lens[d], h // group]) . V

    Args:
        q: [num_decodes, num_heads, head_dim].
        block_tables: int32 [num_decodes, max_pages]; entries past the context are ignored.
        context_lens: int32 [num_decodes], the query's own token included; 0 for a row that pads
            the batch, whose output is unspecified.
        plan: how kernels divide the work; ignored.
        out: where to write; without one, in a new tensor.

    Returns:
        out [num_decodes, num_heads, head_dim]
    """
    lengths = context_lens.tolist()
    groups = _rows_of_similar_length(lengths, kv_cache.shape[3])
    if len(groups) == 1:
        attended = _decode_group(q, kv_cache, layer, block_tables, context_lens, lengths, sm_scale)
        return attended if out is None else out.copy_(attended)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for rows in groups:
        index = torch.tensor(rows, device=q.device)
        out[index] = _decode_group(
            q[index],
            kv_cache,
            layer,
            block_tables[index],
            context_lens[index],
            [lengths[row] for row in rows],
            sm_scale,
        )
    return out


def _rows_of_similar_length(context_lens: list[int], page_tokens: int) -> list[list[int]]:
    """Rows grouped so that padding to a group's longest context at most doubles its pages."""
    groups: dict[int, list[int]] = {}
    for row, context_len in enumerate(context_lens):
        num_pages = -(-context_len // page_tokens)
        groups.setdefault((num_pages - 1).bit_length(), []).append(row)
    return list(groups.values())


def _decode_group(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    lengths: list[int],
    sm_scale: float,
) -> torch.Tensor:
    """`paged_decode` of rows padded to their longest context; `lengths` lists `context_lens`."""
    num_decodes, num_heads, head_dim = q.shape
    num_kv_heads = kv_cache.shape[4]
    longest = max(lengths)
    num_pages = -(-longest // kv_cache.shape[3])
    keys, values = gather_kv(kv_cache, layer, block_tables[:, :num_pages])
    mask = None
    if min(lengths) < longest:
        visible = torch.arange(keys.shape[1], device=q.device) < context_lens.unsqueeze(1)
        # Stale and padding pages may hold anything, and no mask undoes a NaN.
        hidden = (~visible).flatten().nonzero().squeeze(1)
        keys.flatten(0, 1).index_fill_(0, hidden, 0)
        values.flatten(0, 1).index_fill_(0, hidden, 0)
        mask = visible[:, None, None, :longest]
    keys, values = keys[:, :longest], values[:, :longest]
    # Grouped heads ride as query rows of their KV head.
    out = F.scaled_dot_product_attention(
        q.view(num_decodes, num_kv_heads, num_heads // num_kv_heads, head_dim),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        scale=sm_scale,
    )
    return out.reshape(num_decodes, num_heads, head_dim)
