"""transformers' Llama of a benchmark's shape, over weights that the engine could have.

`check` compares with it and `peft_backend` measures it.
"""

from collections.abc import Mapping
from typing import Any

import torch

from slora_core.models.config import ModelConfig


def llama_config(model: ModelConfig) -> Any:
    """The `LlamaConfig` of a shape."""
    from transformers import LlamaConfig

    layer = model.layers[0]
    attention = layer.attention
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=layer.mlp.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": attention.rotary.theta},
        tie_word_embeddings=model.tie_word_embeddings,
    )


def make_llama(model: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> Any:
    """A `LlamaForCausalLM` that shares the memory of `tensors`, named as in a checkpoint."""
    from transformers import LlamaForCausalLM

    config = llama_config(model)
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    llama.load_state_dict(tensors, strict=True, assign=True)
    # Its buffers are computed, not loaded.
    with next(iter(tensors.values())).device:
        llama.model.rotary_emb = type(llama.model.rotary_emb)(config)
    return llama.eval()
