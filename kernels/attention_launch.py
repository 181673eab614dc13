"""How the attention kernels are compiled for a head size and dtype.

Plain tables without Triton, so that a plan can be made where no kernel runs.
"""

from typing import NamedTuple

import torch

# tl.dot multiplies no smaller tiles.
MIN_BLOCK = 16


class AttentionLaunch(NamedTuple):
    """Tokens a tile, and Triton's options.

    KV is fetched (num_stages - 1) // 2 tiles ahead: its addresses are loads too, of page ids, and
    take every other stage.
    """

    block_tokens: int
    num_warps: int
    num_stages: int


# By the padded head size, for elements of two bytes: the first that is not exceeded.
DECODE = {
    64: AttentionLaunch(block_tokens=64, num_warps=4, num_stages=3),
    128: AttentionLaunch(block_tokens=64, num_warps=4, num_stages=3),
    256: AttentionLaunch(block_tokens=32, num_warps=4, num_stages=3),
}
# By the padded head size as above, then by the packed query rows of a tile.
PREFILL = {
    128: {
        64: AttentionLaunch(block_tokens=64, num_warps=4, num_stages=2),
        32: AttentionLaunch(block_tokens=64, num_warps=4, num_stages=3),
    },
    256: {
        64: AttentionLaunch(block_tokens=32, num_warps=8, num_stages=2),
        32: AttentionLaunch(block_tokens=32, num_warps=4, num_stages=2),
    },
}
# Elements of four bytes serve tests: they take twice the shared memory and no tensor cores.
FP32_DECODE = AttentionLaunch(block_tokens=16, num_warps=8, num_stages=2)
FP32_PREFILL = {32: AttentionLaunch(block_tokens=16, num_warps=8, num_stages=2)}


def padded_head_dim(head_dim: int) -> int:
    """The power of two that kernels compute with."""
    return max(MIN_BLOCK, 1 << (head_dim - 1).bit_length())


def decode_launch(head_dim: int, dtype: torch.dtype) -> AttentionLaunch:
    if dtype.itemsize > 2:
        return FP32_DECODE
    return next(launch for size, launch in DECODE.items() if padded_head_dim(head_dim) <= size)


def prefill_launches(head_dim: int, dtype: torch.dtype) -> dict[int, AttentionLaunch]:
    """By the rows of a plan's tiles, the largest first."""
    if dtype.itemsize > 2:
        return FP32_PREFILL
    return next(table for size, table in PREFILL.items() if padded_head_dim(head_dim) <= size)
