"""The table of rotary angles; rotating is `rotary_kv_write` in `kernels`."""

import math

import torch

from slora_core.models.config import Llama3RopeScaling, RotarySpec


def rotary_table(spec: RotarySpec, num_positions: int, dtype: torch.dtype) -> torch.Tensor:
    """[num_positions, dim]: cos of the dim / 2 frequencies, then their sin.

    Angles are computed in fp32 and rounded to `dtype` last, as Hugging Face does.
    """
    exponents = torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim
    inverse = 1.0 / (spec.theta**exponents)
    if spec.scaling is not None:
        inverse = _llama3_scaled(inverse, spec.scaling)
    angles = torch.outer(torch.arange(num_positions).float(), inverse)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)


def _llama3_scaled(inverse: torch.Tensor, scaling: Llama3RopeScaling) -> torch.Tensor:
    """Slow down low frequencies by `factor`, keep high ones, blend between (Llama 3.1)."""
    context = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / inverse
    longest, shortest = context / scaling.low_freq_factor, context / scaling.high_freq_factor
    blend = (context / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * inverse / scaling.factor + blend * inverse
    scaled = torch.where(wavelengths > longest, inverse / scaling.factor, inverse)
    between = (wavelengths <= longest) & (wavelengths >= shortest)
    return torch.where(between, blended, scaled)
