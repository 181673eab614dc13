"""Which adapters are told to be of another base model."""

import json

import pytest

from slora_core.adapters.adapter_rules import AdapterRules
from slora_core.adapters.peft_weights import read_peft_adapter
from tests.factories import make_random_adapter


@pytest.mark.parametrize(
    ("trained_for", "is_other"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", False),
        ("unsloth/smollm2-135m-instruct-bnb-4bit", False),
        ("unsloth/SmolLM2-135M-Instruct-unsloth-bnb-4bit", False),
        ("TheBloke/SmolLM2-135M-Instruct-GPTQ", False),
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("meta-llama/Llama-3.1-8B", True),
        # What a path is called says nothing.
        ("/home/me/models/final", False),
        ("./checkpoint-100", False),
        (None, False),
    ],
)
def test_an_adapter_of_another_base_is_served_with_a_warning(
    tmp_path, model_dir, geometry, trained_for, is_other
) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    path = adapter / "adapter_config.json"
    fields = json.loads(path.read_text()) | {"base_model_name_or_path": trained_for}
    path.write_text(json.dumps(fields))
    rules = AdapterRules(base_names=frozenset({"smollm2-135m-instruct"}))
    warnings = read_peft_adapter(adapter, geometry, rules)[0].warnings
    expected = f"it was trained for {trained_for}; the base model here is smollm2-135m-instruct"
    assert warnings == ((expected,) if is_other else ())
    assert read_peft_adapter(adapter, geometry)[0].warnings == ()
