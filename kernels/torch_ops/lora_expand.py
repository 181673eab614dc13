"""y += scaling * v . B^T for every row's own adapter, a segment at a time."""

import torch

from kernels.lora_segments import LoraSegments
from kernels.torch_ops.lora_stream import stream_rows


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
                b = stream_rows(layer_pool, segment.page_ids, offset_b, rank, right - left)
                shrunk = shrunk_rows[m, segment.start : segment.end, :rank].to(b.dtype)
                rows[:, left:right].addmm_(shrunk, b, alpha=segment.scaling[layer][module])
