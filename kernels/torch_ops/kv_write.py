"""Rotary position embedding, and writing keys and values to their pages."""

import torch


def rotary_kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    kv_places: torch.Tensor,
) -> None:
    """Rotate q and k by their positions (in place) and write k and v to their pages.

    Args:
        q: [rows, num_heads, head_dim], mutated.
        k: [rows, num_kv_heads, head_dim], mutated.
        v: as k.
        cos_sin: [max_positions, rotary_dim], cos of half the frequencies and then their sin; of a
            head, what lies beyond rotary_dim is not turned.
        positions: int32 or int64 [rows].
        kv_cache: mutated at `layer`.
        kv_places: int32 or int64 [rows], page_id * page_tokens + offset of each row's token;
            -1 is a row that pads the batch, of which nothing is read or written.
    """
    if (kv_places < 0).any():
        rows = (kv_places >= 0).nonzero().squeeze(1)
        turned_q, turned_k = q[rows], k[rows]
        rotary_kv_write(
            turned_q,
            turned_k,
            v[rows],
            cos_sin,
            positions[rows],
            kv_cache,
            layer,
            kv_places[rows],
        )
        q[rows], k[rows] = turned_q, turned_k
        return
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    for x in (q, k):
        first, second = x[..., : cos_sin.shape[1]].chunk(2, dim=-1)
        rotated_first = first * cos - second * sin
        rotated_second = second * cos + first * sin
        first.copy_(rotated_first)
        second.copy_(rotated_second)
    page_tokens = kv_cache.shape[3]
    page_ids = kv_places // page_tokens
    offsets = kv_places % page_tokens
    kv_layer = kv_cache[:, layer]
    kv_layer[page_ids, 0, offsets] = k
    kv_layer[page_ids, 1, offsets] = v
