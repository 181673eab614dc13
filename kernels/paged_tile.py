"""One token tile of paged attention, which `paged_decode` and `paged_prefill` loop over.

Streaming softmax (Milakov and Gimelshein, 2018; FlashAttention-2, section 3.1) in powers of two.
"""

import triton
import triton.language as tl


@triton.jit
def attend_tile(
    q,
    acc,
    row_max,
    row_sum,
    kv_head_ptr,
    table_ptr,
    first_token,
    num_tokens,
    last_visible,
    qk_scale,
    page_stride,
    value_stride,
    token_stride,
    PAGE_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold tokens [first_token, first_token + BLOCK_TOKENS) of a context into a softmax.

    acc, row_max and row_sum are (exp2(s - row_max)).V, max and sum of exp2(s - row_max) of the
    scores s = qk_scale * q.K seen so far; returns all three with the tile included.

    Args:
        q: [M, D], zero beyond HEAD_DIM.
        acc: fp32 [M, D]; row_max and row_sum are fp32 [M].
        kv_head_ptr: K of one head in token 0 of page 0, with V `value_stride` further on.
        table_ptr: the context's row of the block table.
        num_tokens: the tile's tokens from here on are not read: pages may hold anything there.
        last_visible: int32 [M], the last token that each row sees; at least one row's is in the
            tile or beyond it, and every row has seen a token by its end.
        MASKED: without, the whole tile must lie below num_tokens and be visible to all rows.
    """
    BLOCK_D: tl.constexpr = q.shape[1]
    tokens = first_token + tl.arange(0, BLOCK_TOKENS)  # [N]
    dims = tl.arange(0, BLOCK_D)  # [D]
    if MASKED:
        page_ids = tl.load(table_ptr + tokens // PAGE_TOKENS, mask=tokens < num_tokens, other=0)
    else:
        page_ids = tl.load(table_ptr + tokens // PAGE_TOKENS)
    token_offsets = page_ids.to(tl.int64) * page_stride + tokens % PAGE_TOKENS * token_stride
    key_ptrs = kv_head_ptr + token_offsets[:, None] + dims[None, :]  # [N, D]

    # p = 0 does not undo a NaN of V: what is not the context's is not loaded.
    if MASKED:
        mask = tokens[:, None] < num_tokens
        if BLOCK_D != HEAD_DIM:
            mask = mask & (dims[None, :] < HEAD_DIM)
        keys = tl.load(key_ptrs, mask=mask, other=0.0)
        values = tl.load(key_ptrs + value_stride, mask=mask, other=0.0)
    elif BLOCK_D != HEAD_DIM:
        keys = tl.load(key_ptrs, mask=dims[None, :] < HEAD_DIM, other=0.0)
        values = tl.load(key_ptrs + value_stride, mask=dims[None, :] < HEAD_DIM, other=0.0)
    else:
        keys = tl.load(key_ptrs)
        values = tl.load(key_ptrs + value_stride)

    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * qk_scale  # [M, N]
    if MASKED:
        scores = tl.where(tokens[None, :] <= last_visible[:, None], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    p = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, row_sum
