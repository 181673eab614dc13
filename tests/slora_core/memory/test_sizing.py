"""Pages are counted up, and the pool's tensor has the shape its readers expect."""

import pytest

from slora_core.config import EngineConfig
from slora_core.dtypes import torch_dtype
from slora_core.memory.page_pool import pages_for
from slora_core.memory.sizing import allocate_pool
from slora_core.models.registry import parse_model_config

MODEL = parse_model_config(
    {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
    },
    {},
)


@pytest.mark.parametrize("tokens,pages", [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (320, 20)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens, 16) == pages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pool_shape(dtype: str) -> None:
    # The last, unfilled page does not count.
    pool = allocate_pool(MODEL, EngineConfig(num_pool_tokens=95, page_tokens=16, dtype=dtype))
    assert pool.shape == (5, 3, 2 * 16 * 2 * 4)
    assert pool.dtype == torch_dtype(dtype)
    assert not pool.any()


def test_refuses_pages_it_cannot_make() -> None:
    with pytest.raises(ValueError, match="a page of 48 elements .* not a multiple of 64"):
        allocate_pool(MODEL, EngineConfig(page_tokens=3))
