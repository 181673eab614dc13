"""Of which types an adapter's tensors may be."""

import torch

from slora_core.errors import InvalidAdapterError
from slora_core.quoting import plain

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SUPPORTED = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)


def check_dtype(name: str, tensor: torch.Tensor) -> None:
    """Raises `InvalidAdapterError` for a tensor (named) that is not of a supported type."""
    if tensor.dtype in _DTYPES:
        return
    found = str(tensor.dtype).removeprefix("torch.")
    kind = "fp8 adapters are not supported" if found.startswith("float8") else "not a float type"
    raise InvalidAdapterError(
        f"tensor {plain(name)} has dtype {found}: {kind}; supported are {SUPPORTED}"
    )
