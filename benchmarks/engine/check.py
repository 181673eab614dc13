"""Logits of the decoder on random weights against transformers, on the device to be measured."""

import sys
from collections.abc import Mapping

import torch

from benchmarks.engine.llama_reference import make_llama
from benchmarks.kernels.compare import relative_error
from slora_core.config import EngineConfig
from slora_core.dtypes import dtype_name
from slora_core.engine.engine import Engine
from slora_core.models.config import ModelConfig
from slora_core.models.weights import DecoderWeights, checkpoint_views
from slora_core.requests import Request, SamplingParams

NUM_TOKENS = 96
# Ours may be this much farther from fp32 than transformers is in the same dtype.
LIMIT = 1.25
# Where both are this close to fp32, they are equal.
FLOOR = 1e-5


def check_logits(model: ModelConfig, weights: DecoderWeights, device: str) -> tuple[float, float]:
    """Last logits of one prompt, ours and transformers', against transformers in fp32.

    Random weights amplify rounding, layer after layer, so no fixed tolerance would do: rounding as
    transformers rounds is what is asked. Exits where ours are farther off.

    Returns:
        ||ours - fp32|| / ||fp32||, and the same of transformers in the weights' dtype.
    """
    prompt = torch.randint(
        model.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1)
    ).to(device)
    views = checkpoint_views(model, weights)
    exact = _transformers_logits(
        model, {name: view.float() for name, view in views.items()}, prompt
    )
    theirs = relative_error(_transformers_logits(model, views, prompt), exact)
    config = EngineConfig(
        device=device,
        dtype=dtype_name(weights.embedding.dtype),
        num_pool_tokens=1024,
        max_running_requests=1,
        cuda_graphs=False,
    )
    engine = Engine(model, config, weights)
    engine.add_request(Request(prompt.tolist(), SamplingParams(max_tokens=1, temperature=0.0)))
    inputs = engine.builder.build(engine.scheduler.schedule().chunks)
    ours = relative_error(engine.runner.logits(inputs)[0], exact)
    figures = f"logits differ from fp32 by {ours:.2g} of their norm, transformers' by {theirs:.2g}"
    if not ours < max(LIMIT * theirs, FLOOR):
        sys.exit(f"no report: {figures}")
    print(figures, file=sys.stderr)
    return ours, theirs


@torch.inference_mode()
def _transformers_logits(
    model: ModelConfig, tensors: Mapping[str, torch.Tensor], prompt: torch.Tensor
) -> torch.Tensor:
    """fp32 [vocab_size] of the prompt's last token; the model shares the tensors' memory."""
    return make_llama(model, tensors)(prompt.unsqueeze(0)).logits[0, -1].float()
