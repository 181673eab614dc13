"""One token tile of paged attention, which `paged_decode` and `paged_prefill` loop over.

Streaming softmax (Milakov and Gimelshein, 2018; FlashAttention-2, section 3.1) in powers of two.
"""

from typing import NamedTuple

import triton
import triton.language as tl


# Kernels make these tuples of their arguments: see `lora_stream`.
class Queries(NamedTuple):
    """Query rows of one KV head."""

    # [M, D], zero beyond HEAD_DIM.
    q: tl.tensor
    # int32 [M], the last token that each row sees.
    last_visible: tl.tensor
    # log2(e) times the scale of the softmax, positive.
    qk_scale: tl.tensor


class Context(NamedTuple):
    """One KV head's tokens of a request, on pages."""

    # K of the head in token 0 of page 0, with V `value_stride` further on.
    kv_head_ptr: tl.tensor
    # The request's row of the block table.
    table_ptr: tl.tensor
    # Tokens from here on are not read: pages may hold anything there.
    num_tokens: tl.tensor
    page_tokens: tl.tensor
    page_stride: tl.tensor
    value_stride: tl.tensor
    token_stride: tl.tensor


class Softmax(NamedTuple):
    """What is kept of the scores s = qk_scale * q.K seen so far, fp32."""

    # [M, D]: exp2(s - row_max) . V
    acc: tl.tensor
    # [M]
    row_max: tl.tensor
    # [M]: of exp2(s - row_max)
    row_sum: tl.tensor


@triton.jit
def empty_softmax(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    return Softmax(
        acc=tl.zeros([ROWS, BLOCK_D], dtype=tl.float32),
        row_max=tl.full([ROWS], float("-inf"), dtype=tl.float32),
        row_sum=tl.zeros([ROWS], dtype=tl.float32),
    )


@triton.jit
def attend_tile(
    softmax,
    queries,
    context,
    first_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The `Softmax` with tokens [first_token, first_token + BLOCK_TOKENS) of the context included.

    Args:
        queries: at least one row sees the tile's first token, and every row has seen a token by
            the tile's end.
        MASKED: without, the context has the whole tile and all rows see it.
    """
    BLOCK_D: tl.constexpr = queries.q.shape[1]
    tokens = first_token + tl.arange(0, BLOCK_TOKENS)  # [N]
    dims = tl.arange(0, BLOCK_D)  # [D]
    page_id_ptrs = context.table_ptr + tokens // context.page_tokens
    if MASKED:
        page_ids = tl.load(page_id_ptrs, mask=tokens < context.num_tokens, other=0)
    else:
        page_ids = tl.load(page_id_ptrs)
    token_offsets = page_ids.to(tl.int64) * context.page_stride
    token_offsets += tokens % context.page_tokens * context.token_stride
    key_ptrs = context.kv_head_ptr + token_offsets[:, None] + dims[None, :]  # [N, D]

    # p = 0 does not undo a NaN of V: what is not the context's is not loaded.
    if MASKED:
        mask = tokens[:, None] < context.num_tokens
        if BLOCK_D != HEAD_DIM:
            mask = mask & (dims[None, :] < HEAD_DIM)
        keys = tl.load(key_ptrs, mask=mask, other=0.0)
        values = tl.load(key_ptrs + context.value_stride, mask=mask, other=0.0)
    elif BLOCK_D != HEAD_DIM:
        keys = tl.load(key_ptrs, mask=dims[None, :] < HEAD_DIM, other=0.0)
        values = tl.load(key_ptrs + context.value_stride, mask=dims[None, :] < HEAD_DIM, other=0.0)
    else:
        keys = tl.load(key_ptrs)
        values = tl.load(key_ptrs + context.value_stride)

    qk_scale = queries.qk_scale
    products = tl.dot(queries.q, tl.trans(keys), input_precision="ieee")  # [M, N]
    if MASKED:
        is_visible = tokens[None, :] <= queries.last_visible[:, None]
        products = tl.where(is_visible, products, float("-inf"))
    row_max = tl.maximum(softmax.row_max, tl.max(products, 1) * qk_scale)
    # Scaled here and not before, so that scaling and subtracting are one instruction.
    p = tl.exp2(products * qk_scale - row_max[:, None])
    rescale = tl.exp2(softmax.row_max - row_max)
    row_sum = softmax.row_sum * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, softmax.acc * rescale[:, None], input_precision="ieee")
    return Softmax(acc=acc, row_max=row_max, row_sum=row_sum)
