"""What a decoder is given of one step, on the device. It decides nothing and knows no requests."""

from dataclasses import dataclass

import torch

from kernels.lora_segments import LoraSegments
from slora_core.attention.batch import AttentionBatch


@dataclass(frozen=True)
class ForwardBatch:
    """Everything the decoder needs for one step; rows as in `AttentionBatch`."""

    # int32 [T]
    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionBatch
    # None where every row uses the base model.
    lora: LoraSegments | None
    # int32 [R]: rows whose next token is sampled; None where all are.
    logit_rows: torch.Tensor | None
