"""What a model's generation_config.json says of sampling, and what of it cannot be obeyed."""

import logging

import pytest

from slora_core.errors import UnsupportedModelError
from slora_core.models.generation_defaults import (
    OPENAI_DEFAULTS,
    GenerationDefaults,
    generation_defaults,
)


def test_a_silent_file_leaves_openais_defaults():
    assert generation_defaults({}) == generation_defaults({"top_p": None}) == OPENAI_DEFAULTS
    assert GenerationDefaults(1.0, 1.0, 0, 0.0) == OPENAI_DEFAULTS


def test_as_qwen_and_llama_have_it(caplog):
    qwen = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8}
    with caplog.at_level(logging.WARNING):
        assert generation_defaults({**qwen, "top_k": 20}) == GenerationDefaults(0.7, 0.8, 20, 0.0)
    assert "generation_config.json has repetition_penalty, which is not supported" in caplog.text
    llama = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "min_p": 0.05}
    assert generation_defaults(llama) == GenerationDefaults(0.6, 0.9, 0, 0.05)


@pytest.mark.parametrize("top_k", [0, -1, None])
def test_a_top_k_that_keeps_all(top_k):
    assert generation_defaults({"top_k": top_k}) == OPENAI_DEFAULTS


def test_what_changes_nothing_is_not_told(caplog):
    generation_defaults({"repetition_penalty": 1.0, "num_beams": 1, "bad_words_ids": None})
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", True),
        ("top_k", -2),
    ],
)
def test_a_value_that_no_request_could_have_is_refused(field, value):
    with pytest.raises(UnsupportedModelError, match=f"^{field} in generation_config.json is"):
        generation_defaults({field: value})
