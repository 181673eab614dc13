"""Tensors of a step that an attention backend reads: block tables, lengths, plans."""

from dataclasses import dataclass

import torch

from kernels.attention_plan import DecodePlan, PrefillPlan


@dataclass(frozen=True)
class AttentionBatch:
    """Block tables and lengths of a step, decode rows first, on the device.

    Rows [0, num_decodes) are one token of one request each; prefill request p has rows
    [query_indptr[p], query_indptr[p + 1]). Context lengths count the rows' own tokens. Block tables
    hold valid page ids past the context length too, which are never read. Where a CUDA graph is
    captured, both numbers are the most that it has room for: rows without a context are no decodes,
    though prefills may have them, and requests without rows are no prefills.
    """

    # int32 [T]: page_id * page_tokens + offset of each row's own token; -1 for a padding row.
    kv_places: torch.Tensor
    num_decodes: int
    # int32 [num_decodes, max_pages], int32 [num_decodes]
    decode_block_tables: torch.Tensor
    decode_context_lens: torch.Tensor
    # int32 [P + 1], int32 [P, max_pages], int32 [P]
    query_indptr: torch.Tensor
    prefill_block_tables: torch.Tensor
    prefill_context_lens: torch.Tensor
    # How Triton's kernels divide the work; None where the torch twins run.
    decode_plan: DecodePlan | None = None
    prefill_plan: PrefillPlan | None = None

    @property
    def num_prefills(self) -> int:
        return self.prefill_context_lens.shape[0]
