"""Compiles the kernel of every op for an H100 on any machine; a program of its own."""

import sys
from typing import Any

import torch
from triton import knobs

from kernels.compile_together import compile_together
from tests.absent_gpu import pretend_gpu
from tests.kernels.cases import make_lora_case, make_paged_case

BF16 = torch.bfloat16
EPS = 1e-5


def _attend(ops: Any) -> None:
    case = make_paged_case([40, 200], num_kv_heads=2, head_dim=128, dtype=BF16)
    args = case.block_tables, case.context_lens, 0.1
    q = torch.zeros(2, 8, 128, dtype=BF16)
    ops.paged_decode(q, case.kv_cache, case.layer, *args)
    q = torch.zeros(60, 8, 128, dtype=BF16)
    indptr = torch.tensor([0, 20, 60], dtype=torch.int32)
    ops.paged_prefill(q, case.kv_cache, case.layer, indptr, *args)
    kv = torch.zeros(60, 2, 128, dtype=BF16)
    rows = torch.zeros(60, dtype=torch.int32)
    cos_sin = torch.zeros(256, 128, dtype=BF16)
    ops.rotary_kv_write(q, kv, kv.clone(), cos_sin, rows, case.kv_cache, case.layer, rows)


def _change(ops: Any, block_rows: int, max_rank: int) -> None:
    """LoRA by tiles of so many rows."""
    case = make_lora_case(
        [(0, 3), (1, 80), (-1, 2)],
        [[8, 8], [16, 16]],
        [(1024, 1024)] * 2,
        dtype=BF16,
        page_elems=1 << 15,
        block_rows=block_rows,
        max_rank=max_rank,
    )
    args = case.pool, 0, (0, 1)
    y = torch.zeros(85, 2048, dtype=BF16)
    v = ops.lora_shrink(y[:, :1024].contiguous(), *args, case.segments)
    ops.lora_expand(y, v, *args, (0, 1024, 2048), case.segments)
    ops.lora_silu_mul(y, v, *args, case.segments)


def main() -> None:
    """Write the name of each kernel that was compiled."""
    pretend_gpu()
    from kernels import triton_ops

    def report(*, fn: Any, **_: Any) -> None:
        sys.stdout.write(f"{fn.name}\n")

    knobs.runtime.jit_post_compile_hook = report
    x = torch.zeros(4, 4096, dtype=BF16)
    with compile_together():
        triton_ops.rms_norm(x, x[0], EPS)
        triton_ops.add_rms_norm(x, x, x[0], EPS)
        triton_ops.silu_mul(x)
        _attend(triton_ops)
        for block_rows, max_rank in ((16, 16), (16, 64), (64, 16), (64, 256)):
            _change(triton_ops, block_rows, max_rank)


if __name__ == "__main__":
    main()
