"""Settings out of range are refused by name and value, before a tensor could overflow on them."""

import pickle

import pytest

from slora_core.config import EngineConfig
from slora_core.errors import InvalidRequestError
from slora_core.models.registry import parse_model_config
from slora_core.requests import SamplingParams
from tests.factories import ALL_MODULES

MODEL = parse_model_config(
    {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 100,
    },
    {},
)


@pytest.mark.parametrize(
    "name,value",
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("top_k", 2**63),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
    ],
)
def test_sampling_values_out_of_range(name: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} is .*; it must be ") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert str(value) in str(caught.value)
    # Errors cross process borders.
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.param) == (str(caught.value), name)


def test_sampling_values_at_the_border() -> None:
    SamplingParams(max_tokens=1, temperature=100.0, top_p=1e-9, top_k=2**63 - 1, min_p=1.0)
    SamplingParams(seed=-(2**63))
    assert SamplingParams(temperature=0.0).greedy
    assert not SamplingParams(temperature=1e-9).greedy


@pytest.mark.parametrize(
    "name",
    [
        "page_tokens",
        "max_batched_tokens",
        "max_running_requests",
        "max_model_len",
    ],
)
def test_engine_sizes_below_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        EngineConfig(**{name: 0})


@pytest.mark.parametrize("value", [0, 3])
def test_steps_in_flight(value: int) -> None:
    with pytest.raises(ValueError, match=f"max_inflight_steps is {value}; it must be 1 or 2"):
        EngineConfig(max_inflight_steps=value)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_shared_prefill_fraction(value: float) -> None:
    with pytest.raises(
        ValueError, match=f"shared_prefill_fraction is {value}; it must be at least 0 and below 1"
    ):
        EngineConfig(shared_prefill_fraction=value)


def test_pool_of_less_than_a_page() -> None:
    with pytest.raises(ValueError, match="num_pool_tokens is 15; it must be at least page_tokens"):
        EngineConfig(page_tokens=16, num_pool_tokens=15)


def test_derived_sizes() -> None:
    config = EngineConfig(page_tokens=16, num_pool_tokens=100)
    assert config.num_pages == 6
    assert config.page_elems(MODEL) == 2 * 16 * 2 * 8
    first, second = MODEL.module_dims
    assert first == second
    dims = dict(zip(ALL_MODULES, first, strict=True))
    assert dims["q_proj"] == (24, 48)
    assert dims["k_proj"] == dims["v_proj"] == (24, 16)
    assert dims["o_proj"] == (48, 24)
    assert dims["gate_proj"] == dims["up_proj"] == (24, 40)
    assert dims["down_proj"] == (40, 24)


@pytest.mark.parametrize("max_model_len,context", [(None, 100), (60, 60), (100, 100)])
def test_context_len(max_model_len: int | None, context: int) -> None:
    assert EngineConfig(max_model_len=max_model_len).context_len(MODEL) == context


def test_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="max_model_len is 101; the model's limit is 100 tokens"):
        EngineConfig(max_model_len=101).context_len(MODEL)
