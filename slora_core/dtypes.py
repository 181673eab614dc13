"""The dtypes of weights, KV and adapters in torch, by the names that a configuration uses."""

import torch

from slora_core.config import DTYPES


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of one of `config.DTYPES`."""
    assert name in DTYPES, f"{name} is none of {DTYPES}"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in a configuration."""
    return str(dtype).removeprefix("torch.")
