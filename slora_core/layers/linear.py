"""Linears as objects: what LoRA wraps and what a checkpoint fills.

A linear knows nothing of adapters, of its place in a layer, or of names but the suffixes that
checkpoints give its tensors. One of another kind (quantized, sharded) is another class.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F


class Linear(Protocol):
    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in_features] to a new tensor [rows, out_features]."""

    def rows(self, start: int, end: int) -> Mapping[str, torch.Tensor]:
        """Views of what output features [start, end) are computed with, to be filled.

        By the suffixes of their names in a checkpoint.
        """


class DenseLinear:
    """y = x . weight^T + bias, for weight [out_features, in_features] and bias [out_features]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def rows(self, start: int, end: int) -> dict[str, torch.Tensor]:
        views = {"weight": self.weight[start:end]}
        if self.bias is not None:
            views["bias"] = self.bias[start:end]
        return views
