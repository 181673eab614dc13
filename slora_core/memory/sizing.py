"""Allocates the tensor of the unified pool and counts pages."""

import torch

from slora_core.config import EngineConfig, ModelConfig


def pages_for(num_tokens: int, page_tokens: int) -> int:
    """KV pages that `num_tokens` tokens take."""
    return -(-num_tokens // page_tokens)


def allocate_pool(model: ModelConfig, engine: EngineConfig) -> torch.Tensor:
    """The pool, zeroed: [num_pages, num_layers, page_elems] of the engine's dtype and device.

    Raises:
        ValueError: a page that is no multiple of 64 elements, or a pool of no page.
    """
    if engine.num_pages < 1:
        raise ValueError(
            f"num_pool_tokens is {engine.num_pool_tokens}, less than one page of "
            f"{engine.page_tokens} tokens"
        )
    shape = (engine.num_pages, model.num_layers, engine.page_elems(model))
    return torch.zeros(shape, dtype=engine.dtype, device=engine.device)
