"""Keys and values of requests, gathered from their pages, for attention."""

import torch


def gather_kv(
    kv_cache: torch.Tensor, layer: int, block_tables: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the pages of each request: K and V as [requests, tokens, num_kv_heads, head_dim]."""
    shape = (block_tables.shape[0], -1, *kv_cache.shape[4:])
    page_ids = block_tables.flatten()
    kv_layer = kv_cache[:, layer]
    # index_select copies whole pages, which indexing does not.
    keys = kv_layer[:, 0].index_select(0, page_ids).view(shape)
    return keys, kv_layer[:, 1].index_select(0, page_ids).view(shape)
