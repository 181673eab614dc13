"""v = x . A^T for every row's own adapter, a segment at a time."""

import torch

from kernels.lora_segments import LoraSegments
from kernels.torch_ops.lora_stream import stream_rows


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
                a = stream_rows(layer_pool, segment.page_ids, offset_a, rank, in_features)
                v[0, m, segment.start : segment.end, :rank] = rows @ a.T
    return v
