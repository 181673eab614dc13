"""Allocates the tensor of the unified pool and counts pages."""

import torch

from slora_core.config import EngineConfig
from slora_core.dtypes import torch_dtype
from slora_core.models.config import ModelConfig


def page_bytes(model: ModelConfig, engine: EngineConfig) -> int:
    """Bytes of one page over all layers."""
    return model.num_layers * engine.page_elems(model) * torch_dtype(engine.dtype).itemsize


def allocate_pool(model: ModelConfig, engine: EngineConfig) -> torch.Tensor:
    """The pool, zeroed: [num_pages, num_layers, page_elems] of the engine's dtype and device.

    On CUDA a page is one block of memory, so that one DMA copies an adapter's run of pages. On
    the CPU a layer is: adjacent pages of an adapter are then one stream, read where they lie.

    Raises:
        ValueError: a page that is no multiple of 64 elements.
    """
    dtype = torch_dtype(engine.dtype)
    num_pages, num_layers, page_elems = engine.num_pages, model.num_layers, engine.page_elems(model)
    if engine.device == "cpu":
        pool = torch.zeros(num_layers, num_pages, page_elems, dtype=dtype)
        return pool.transpose(0, 1)
    return torch.zeros(num_pages, num_layers, page_elems, dtype=dtype, device=engine.device)
