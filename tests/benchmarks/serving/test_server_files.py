"""Numbered copies are different adapters of the same weights; dummies load like real models."""

import os

import pytest

from benchmarks.serving.server_files import (
    adapter_dirs,
    make_dummy_adapters,
    make_dummy_model,
    number_adapters,
    numbered_order,
)
from benchmarks.serving.settings import SETTINGS
from slora_core.adapters.peft_weights import inspect_peft_adapter
from slora_core.models.registry import load_model_config
from slora_core.text.tokenizer import Tokenizer
from tests.factories import make_geometry

TINY = {
    **SETTINGS["Real"].hf_config,
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@pytest.fixture
def model(tmp_path):
    return make_dummy_model(TINY, tmp_path / "model")


def test_numbered_copies(tmp_path, model):
    sources = make_dummy_adapters(model, (4, 16), ("q_proj", "v_proj"), tmp_path / "sources")
    assert [path.name for path in sources] == ["rank-4", "rank-16"]
    assert adapter_dirs(tmp_path / "sources") == sorted(sources)
    names = number_adapters(sources, 5, tmp_path / "out")
    assert names == ["rank-4-0", "rank-16-0", "rank-4-1", "rank-16-1", "rank-4-2"]
    geometry = make_geometry(model)
    summaries = [inspect_peft_adapter(tmp_path / "out" / name, geometry) for name in names]
    assert len({summary.adapter_id for summary in summaries}) == 5
    assert [summary.max_rank for summary in summaries] == [4, 16, 4, 16, 4]
    weights = tmp_path / "out" / "rank-4-0" / "adapter_model.safetensors"
    assert weights.read_bytes() == (sources[0] / "adapter_model.safetensors").read_bytes()


def test_weights_are_copied_where_links_are_not_possible(tmp_path, model, monkeypatch):
    def refuse(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    sources = make_dummy_adapters(model, (4,), ("q_proj",), tmp_path / "sources")
    number_adapters(sources, 2, tmp_path / "out")
    assert len(adapter_dirs(tmp_path / "out")) == 2
    inspect_peft_adapter(tmp_path / "out" / "rank-4-1", make_geometry(model))


def test_sources_take_turns():
    names = ["a-0", "a-1", "a-10", "b-0", "b-1", "plain"]
    assert numbered_order(names) == ["a-0", "b-0", "plain", "a-1", "b-1", "a-10"]


def test_a_dummy_model_has_a_config_and_a_text_for_every_token(model):
    config = load_model_config(model)
    assert (config.vocab_size, config.num_layers, config.tie_word_embeddings) == (300, 2, True)
    tokenizer = Tokenizer(model)
    assert tokenizer.decode([5, 299, 0]) == " t5 t299 t0"
    assert tokenizer.encode(" t5 t299") == [5, 299]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))
def test_settings(setting):
    """Configs are ones that the engine takes, and workloads fit their contexts."""
    from slora_core.models.registry import parse_model_config

    config = parse_model_config(setting.hf_config, {})
    longest = setting.input_range[1] + setting.output_range[1]
    assert longest <= config.max_position_embeddings
    assert setting.served_name(True) != setting.served_name(False)
    trace_config = setting.trace_config(7, debug=True, rate=2.0, cv=None)
    assert (trace_config.num_adapters, trace_config.rate, trace_config.cv) == (7, 2.0, 1.0)
    assert trace_config.duration_s == setting.debug_duration_s


def test_the_settings_have_the_shapes_they_name():
    from slora_core.models.registry import parse_model_config

    def num_parameters(name):
        config = parse_model_config(SETTINGS[name].hf_config, {})
        layers = sum(rows * columns for dims in config.module_dims for rows, columns in dims)
        embeddings = config.vocab_size * config.hidden_size
        return layers + embeddings * (1 if config.tie_word_embeddings else 2)

    # Llama's paper: 6.7 and 13.0 billion; SmolLM2: 135 million.
    assert num_parameters("S1") == num_parameters("S2") == pytest.approx(6.74e9, rel=0.01)
    assert num_parameters("S4") == pytest.approx(13.0e9, rel=0.01)
    assert num_parameters("Real") == pytest.approx(134.5e6, rel=0.01)
