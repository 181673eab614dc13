"""By what a server's arguments let its registry check adapters."""

import json

import pytest
from safetensors.torch import load_file

from app.args import SLoRAArgs
from app.models.geometry import registry_rules
from tests.factories import make_model


@pytest.fixture
def model_dir(tmp_path):
    return make_model(tmp_path / "Tiny", "llama", tie_word_embeddings=True)


def test_the_base_model_by_all_its_names(model_dir):
    config = model_dir / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "org/Origin"}))
    args = SLoRAArgs(model=str(model_dir), served_model_name="assistant")
    assert registry_rules(args).base_names == ("assistant", str(model_dir), "org/Origin")


def test_whole_tensors_are_compared_with_the_models(model_dir):
    rules = registry_rules(SLoRAArgs(model=str(model_dir), unknown_adapter_fields="warn"))
    assert rules.unknown_fields == "warn"
    head = load_file(model_dir / "model.safetensors")["model.embed_tokens.weight"]
    assert rules.base_tensors.differing_rows("lm_head", head) == 0
    assert rules.base_tensors.differing_rows("lm_head", head + 1) == len(head)


def test_random_weights_are_nobodys_base(model_dir):
    rules = registry_rules(SLoRAArgs(model=str(model_dir), load_format="dummy"))
    assert rules.base_names == () and rules.base_tensors is None
