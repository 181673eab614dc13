"""Rotary position embedding of queries and keys, fused with writing keys and values to their pages.

A program takes some heads of one row: of the queries, or of the keys and values. `torch_ops` says
what is computed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Of each half of the heads that a program takes: 8 elements a thread, a load of 16 bytes.
BLOCK_ELEMS = 1024
ELEMS_PER_WARP = 256


class RotaryLaunch(NamedTuple):
    block_heads: int
    block_half: int
    num_warps: int


def rotary_launch(num_heads: int, rotary_dim: int) -> RotaryLaunch:
    block_half = triton.next_power_of_2(rotary_dim // 2)
    block_heads = min(triton.next_power_of_2(num_heads), max(1, BLOCK_ELEMS // block_half))
    num_warps = max(1, block_heads * block_half // ELEMS_PER_WARP)
    return RotaryLaunch(block_heads, block_half, num_warps)


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

    Products and sums are each rounded to the dtype, as in the twin: 16-bit results have its bits.
    In fp32 a product and the sum may be one fused operation.

    Args:
        q: [rows, num_heads, head_dim], mutated; as k and v, head_dim contiguous and before it any
            strides, as the columns of a fused projection have.
        k: [rows, num_kv_heads, head_dim], mutated.
        v: as k.
        cos_sin: [max_positions, rotary_dim], cos of half the frequencies and then their sin; of a
            head, what lies beyond rotary_dim is not turned.
        positions: int32 or int64 [rows].
        kv_cache: mutated at `layer`.
        kv_places: int32 or int64 [rows], page_id * page_tokens + offset of each row's token;
            -1 is a row that pads the batch, of which nothing is read or written.
    """
    rows, num_heads, head_dim = q.shape
    num_kv_heads, rotary_dim = k.shape[1], cos_sin.shape[1]
    if not rows:
        return
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1, "head_dim is contiguous"
    assert cos_sin.is_contiguous() and positions.is_contiguous() and kv_places.is_contiguous()
    # A view of the layer, because a layer index among the arguments is compiled for 1 and for 16.
    kv_layer = kv_cache[:, layer]
    page_stride, value_stride, token_stride, head_stride, _ = kv_layer.stride()
    launch = rotary_launch(num_heads, rotary_dim)
    num_q_blocks = triton.cdiv(num_heads, launch.block_heads)
    num_blocks = num_q_blocks + triton.cdiv(num_kv_heads, launch.block_heads)
    _rotary_kv_write_kernel[(rows * num_blocks,)](
        q,
        k,
        v,
        cos_sin,
        positions,
        kv_layer,
        kv_places,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        page_stride,
        value_stride,
        token_stride,
        head_stride,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        NUM_Q_BLOCKS=num_q_blocks,
        NUM_BLOCKS=num_blocks,
        PAGE_TOKENS=kv_cache.shape[3],
        HALF=rotary_dim // 2,
        REST=head_dim - rotary_dim,
        BLOCK_HEADS=launch.block_heads,
        BLOCK_HALF=launch.block_half,
        BLOCK_REST=triton.next_power_of_2(head_dim - rotary_dim),
        num_warps=launch.num_warps,
    )


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "kv_places_ptr"])
def _rotary_kv_write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_sin_ptr,
    positions_ptr,
    kv_ptr,
    kv_places_ptr,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    page_stride,
    value_stride,
    token_stride,
    head_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    NUM_Q_BLOCKS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """BLOCK_HEADS heads of a row: of q in its first NUM_Q_BLOCKS programs, then of k and v."""
    row = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
    block = tl.program_id(0) % NUM_BLOCKS
    place = tl.load(kv_places_ptr + row).to(tl.int64)
    position = tl.load(positions_ptr + row)
    if place < 0:
        return
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    cos_ptrs = cos_sin_ptr + position * (2 * HALF) + dims
    cos = tl.load(cos_ptrs, mask=dims < HALF, other=0.0)  # [1, D]
    sin = tl.load(cos_ptrs + HALF, mask=dims < HALF, other=0.0)

    if block < NUM_Q_BLOCKS:
        heads = (block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
        mask = (heads < NUM_HEADS) & (dims < HALF)
        q_ptrs = q_ptr + row * q_row_stride + heads * q_head_stride + dims  # [H, D]
        first, second = _rotated(q_ptrs, cos, sin, mask, HALF)
        tl.store(q_ptrs, first, mask=mask)
        tl.store(q_ptrs + HALF, second, mask=mask)
    else:
        heads = ((block - NUM_Q_BLOCKS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
        mask = (heads < NUM_KV_HEADS) & (dims < HALF)
        v_ptrs = v_ptr + row * v_row_stride + heads * v_head_stride + dims
        first_v = tl.load(v_ptrs, mask=mask)
        second_v = tl.load(v_ptrs + HALF, mask=mask)
        k_ptrs = k_ptr + row * k_row_stride + heads * k_head_stride + dims
        first, second = _rotated(k_ptrs, cos, sin, mask, HALF)
        tl.store(k_ptrs, first, mask=mask)
        tl.store(k_ptrs + HALF, second, mask=mask)
        # Pools are larger than 2^31 elements, so addresses are int64.
        token_offset = place // PAGE_TOKENS * page_stride + place % PAGE_TOKENS * token_stride
        key_ptrs = kv_ptr + token_offset + heads * head_stride + dims
        tl.store(key_ptrs, first, mask=mask)
        tl.store(key_ptrs + HALF, second, mask=mask)
        tl.store(key_ptrs + value_stride, first_v, mask=mask)
        tl.store(key_ptrs + value_stride + HALF, second_v, mask=mask)
        if REST > 0:
            rest = tl.arange(0, BLOCK_REST)[None, :]
            rest_mask = (heads < NUM_KV_HEADS) & (rest < REST)
            rest += 2 * HALF
            rest_k = tl.load(k_ptr + row * k_row_stride + heads * k_head_stride + rest, rest_mask)
            rest_v = tl.load(v_ptr + row * v_row_stride + heads * v_head_stride + rest, rest_mask)
            rest_ptrs = kv_ptr + token_offset + heads * head_stride + rest
            tl.store(rest_ptrs, rest_k, mask=rest_mask)
            tl.store(rest_ptrs + value_stride, rest_v, mask=rest_mask)


@triton.jit
def _rotated(ptrs, cos, sin, mask, HALF: tl.constexpr):
    """Both halves of the heads at `ptrs`, turned by the angles of cos and sin."""
    first = tl.load(ptrs, mask=mask, other=0.0)
    second = tl.load(ptrs + HALF, mask=mask, other=0.0)
    rotated_first = _product(first, cos).to(tl.float32) - _product(second, sin).to(tl.float32)
    rotated_second = _product(second, cos).to(tl.float32) + _product(first, sin).to(tl.float32)
    return rotated_first.to(first.dtype), rotated_second.to(first.dtype)


@triton.jit
def _product(x, y):
    """x * y rounded to x's dtype, once: the product of two elements of 16 bits is exact in fp32."""
    return (x.to(tl.float32) * y.to(tl.float32)).to(x.dtype)
