"""Torch twins of every kernel: the meaning of each op, and the CPU path of the engine.

Ops over the unified pool take it whole, with a layer index: `pool` [num_pages, num_layers,
page_elems], or `kv_cache`, the same memory viewed as [num_pages, num_layers, 2 (K, V),
page_tokens, num_kv_heads, head_dim]. Activations are [rows, features], row-contiguous.
"""

import torch
import torch.nn.functional as F

from kernels.attention_plan import DecodePlan, PrefillPlan
from kernels.lora_segments import LoraSegments
from kernels.row_alignment import row_elems


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, the mean in fp32."""
    x32 = x.float()
    inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * inverse).to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """residual += x (in place); returns rms_norm(residual, weight, eps)."""
    residual.add_(x)
    return rms_norm(residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """y = silu(gate) * up for gate_up [rows, 2 * intermediate] = [gate | up]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rotary_kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    slot_mapping: torch.Tensor,
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
        slot_mapping: int32 or int64 [rows], page_id * page_tokens + offset of each row's token;
            -1 is a row that pads the batch, of which nothing is read or written.
    """
    if (slot_mapping < 0).any():
        rows = (slot_mapping >= 0).nonzero().squeeze(1)
        turned_q, turned_k = q[rows], k[rows]
        rotary_kv_write(
            turned_q,
            turned_k,
            v[rows],
            cos_sin,
            positions[rows],
            kv_cache,
            layer,
            slot_mapping[rows],
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
    page_ids = slot_mapping // page_tokens
    offsets = slot_mapping % page_tokens
    kv_layer = kv_cache[:, layer]
    kv_layer[page_ids, 0, offsets] = k
    kv_layer[page_ids, 1, offsets] = v


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
    keys, values = _gather_kv(kv_cache, layer, block_tables[:, :num_pages])
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
        keys, values = _gather_kv(kv_cache, layer, block_tables[p : p + 1, :num_pages])
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


def lora_shrink(
    x: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    modules: tuple[int, ...],
    segments: LoraSegments,
) -> torch.Tensor:
    """v[m, t, :r] = x[t] . A[slot(t), layer, modules[m]]^T for the true rank r of each row.

    Args:
        x: [rows, in_features], shared by all `modules`.
        modules: indices of modules that read the same input (q, k, v; gate, up).

    Returns:
        fp32 [num_splits, len(modules), rows, max_rank]: sums over parts of in_features, to be
        added up; here one part. Columns from the row's rank on, rows of the base model and
        modules an adapter lacks are unspecified: `lora_expand` does not read them.
    """
    in_features = x.shape[1]
    v = torch.empty(
        1, len(modules), x.shape[0], segments.max_rank, dtype=torch.float32, device=x.device
    )
    layer_pool = pool[:, layer]
    for segment in segments.on_host:
        rows = x[segment.start : segment.end]
        for m, module in enumerate(modules):
            rank, offset_a, _ = segment.offsets[layer][module]
            if rank:
                a = _stream_rows(layer_pool, segment.page_ids, offset_a, rank, in_features)
                v[0, m, segment.start : segment.end, :rank] = rows @ a.T
    return v


def lora_expand(
    y: torch.Tensor,
    v: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    modules: tuple[int, ...],
    out_offsets: tuple[int, ...],
    segments: LoraSegments,
) -> None:
    """y[t, o_m : o_m + out_m] += scaling * v[:, m, t, :r].sum(0) . B[slot(t), layer, modules[m]]^T.

    Rows of the base model and modules an adapter lacks are not touched, bit for bit.

    Args:
        y: [rows, features], mutated: the concatenated outputs of `modules`.
        v: what `lora_shrink` returned for the same modules and segments.
        out_offsets: len(modules) + 1 bounds; module m owns columns
            [out_offsets[m], out_offsets[m + 1]).
    """
    layer_pool = pool[:, layer]
    shrunk_rows = v[0] if len(v) == 1 else v.sum(0)
    for segment in segments.on_host:
        rows = y[segment.start : segment.end]
        for m, module in enumerate(modules):
            rank, _, offset_b = segment.offsets[layer][module]
            if rank:
                left, right = out_offsets[m], out_offsets[m + 1]
                b = _stream_rows(layer_pool, segment.page_ids, offset_b, rank, right - left)
                shrunk = shrunk_rows[m, segment.start : segment.end, :rank].to(b.dtype)
                rows[:, left:right].addmm_(shrunk, b, alpha=segment.scaling[layer][module])


def lora_silu_mul(
    gate_up: torch.Tensor,
    v: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    modules: tuple[int, int],
    segments: LoraSegments,
) -> torch.Tensor:
    """`lora_expand` of [gate | up], then `silu_mul`.

    Args:
        gate_up: [rows, 2 * intermediate]; what it holds afterwards is not specified.
        v: what `lora_shrink` returned for the same modules and segments.
        modules: indices of the modules of gate and of up.
    """
    width = gate_up.shape[1] // 2
    lora_expand(gate_up, v, pool, layer, modules, (0, width, 2 * width), segments)
    return silu_mul(gate_up)


def _gather_kv(
    kv_cache: torch.Tensor, layer: int, block_tables: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the pages of each request: K and V as [requests, tokens, num_kv_heads, head_dim]."""
    shape = (block_tables.shape[0], -1, *kv_cache.shape[4:])
    page_ids = block_tables.flatten()
    kv_layer = kv_cache[:, layer]
    # index_select copies whole pages, which indexing does not.
    keys = kv_layer[:, 0].index_select(0, page_ids).view(shape)
    return keys, kv_layer[:, 1].index_select(0, page_ids).view(shape)


def _stream_rows(
    layer_pool: torch.Tensor, page_table: list[int], offset: int, rank: int, features: int
) -> torch.Tensor:
    """`rank` rows of `features` elements of an adapter's stream: [rank, features], to be read.

    A view where the layer's pages follow one another in memory, else a copy. `layer_pool` is one
    layer of the pool, [num_pages, page_elems].
    """
    page_elems = layer_pool.shape[1]
    width = row_elems(features)
    first, last = offset // page_elems, (offset + rank * width - 1) // page_elems
    page_ids = page_table[first : last + 1]
    start = offset - first * page_elems
    if layer_pool.is_contiguous() and page_ids == list(range(page_ids[0], page_ids[-1] + 1)):
        start += int(layer_pool.storage_offset()) + page_ids[0] * page_elems
        return layer_pool.as_strided((rank, features), (width, 1), start)
    index = torch.tensor(page_ids, device=layer_pool.device)
    stream = layer_pool.index_select(0, index).view(-1)
    return stream[start : start + rank * width].view(rank, width)[:, :features]
