"""Logits of the decoder on random weights against transformers, on the device to be measured."""

import sys

import torch

from slora_core.config import EngineConfig, ModelConfig, SamplingParams
from slora_core.engine import Engine
from slora_core.models.weights import DecoderWeights, checkpoint_views
from slora_core.types import Request

NUM_TOKENS = 96
# Relative error ||ours - theirs|| / ||theirs||: both round to 8 bits of mantissa at every op.
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


def check_logits(model: ModelConfig, weights: DecoderWeights, device: str) -> float:
    """Compare the last logits of one prompt; exits where they differ by more than rounding does."""
    dtype = weights.embedding.dtype
    prompt = torch.randint(
        model.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1)
    )
    expected = _transformers_logits(model, weights, prompt.to(device))
    config = EngineConfig(
        device=device, dtype=dtype, num_pool_tokens=1024, max_running_requests=1, cuda_graphs=False
    )
    engine = Engine(model, config, weights)
    request = Request("check", prompt.tolist(), SamplingParams(max_tokens=1, temperature=0.0))
    engine.add_request(request)
    actual = engine.runner.logits(engine.scheduler.schedule())[0]
    error = float((actual - expected).norm() / expected.norm())
    if not error < LIMITS[dtype]:
        sys.exit(f"no report: logits differ from transformers by {error:.2g} of their norm")
    print(f"logits differ from transformers by {error:.2g} of their norm", file=sys.stderr)
    return error


@torch.inference_mode()
def _transformers_logits(
    model: ModelConfig, weights: DecoderWeights, prompt: torch.Tensor
) -> torch.Tensor:
    """fp32 [vocab_size] of the prompt's last token; the model shares the weights' memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_word_embeddings,
    )
    with torch.device("meta"):
        reference = LlamaForCausalLM(config)
    views = checkpoint_views(model, weights)
    reference.load_state_dict(views, strict=True, assign=True)
    # Buffers have no weights to be assigned.
    rotary = type(reference.model.rotary_emb)(config, device=prompt.device)
    reference.model.rotary_emb = rotary
    return reference.eval()(prompt.unsqueeze(0)).logits[0, -1].float()
