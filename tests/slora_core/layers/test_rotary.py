"""Rotary angles against those of transformers, plain and with Llama-3 scaling."""

import pytest
import torch

from slora_core.layers.rotary import rotary_table
from slora_core.models.config import Llama3RopeScaling, RotarySpec

# As shipped: Llama 3.1 and 3.2, and one in which the whole blend falls on few frequencies.
SCALINGS = {
    "llama-3.1": Llama3RopeScaling(8.0, 1.0, 4.0, 8192),
    "llama-3.2": Llama3RopeScaling(32.0, 1.0, 4.0, 8192),
    "narrow": Llama3RopeScaling(8.0, 2.0, 2.5, 32),
}


def _transformers_cos_sin(
    head_dim: int, theta: float, scaling: Llama3RopeScaling | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        parameters |= {"rope_type": "llama3", **vars(scaling)}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_parameters=parameters,
    )
    positions = torch.arange(4096).unsqueeze(0)
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(1, dtype=dtype), positions)
    return cos[0], sin[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scaling", [None, *SCALINGS])
@pytest.mark.parametrize("head_dim,theta", [(64, 10000.0), (128, 500000.0), (6, 100.0)])
def test_equals_transformers(
    head_dim: int, theta: float, scaling: str | None, dtype: torch.dtype
) -> None:
    rope = SCALINGS[scaling] if scaling else None
    cos, sin = _transformers_cos_sin(head_dim, theta, rope, dtype)
    table = rotary_table(RotarySpec(head_dim, theta, rope), 4096, dtype)
    assert table.dtype == dtype and table.shape == (4096, head_dim)
    half = head_dim // 2
    # transformers repeats the angles for the second half of a head.
    assert torch.equal(table[:, :half], cos[:, :half])
    assert torch.equal(table[:, half:], sin[:, :half])


def test_heads_turned_in_part_equal_transformers() -> None:
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    config = Phi3Config(
        hidden_size=192, num_attention_heads=2, partial_rotary_factor=0.75, pad_token_id=None
    )
    cos, sin = Phi3RotaryEmbedding(config)(torch.empty(1), torch.arange(4096).unsqueeze(0))
    table = rotary_table(RotarySpec(72), 4096, torch.float32)
    assert torch.equal(table, torch.cat((cos[0, :, :36], sin[0, :, :36]), -1))


def test_scaling_slows_low_frequencies_only() -> None:
    scaling = SCALINGS["llama-3.1"]
    plain = rotary_table(RotarySpec(128, 500000.0, None), 2, torch.float64)[1]
    scaled = rotary_table(RotarySpec(128, 500000.0, scaling), 2, torch.float64)[1]
    plain_angles, scaled_angles = (torch.atan2(table[64:], table[:64]) for table in (plain, scaled))
    assert torch.equal(scaled_angles[0], plain_angles[0])
    assert scaled_angles[-1] == pytest.approx(plain_angles[-1] / 8)
    ratio = scaled_angles / plain_angles
    assert (ratio.diff() <= 1e-6).all() and ratio.min() >= 1 / 8 - 1e-6
