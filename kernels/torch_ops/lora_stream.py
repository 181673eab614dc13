"""Rows of an adapter's weights, from the pages of its stream."""

import torch

from kernels.row_alignment import row_elems


def stream_rows(
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
