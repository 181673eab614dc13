"""Tensors that training named through wrappers are read as PEFT would name them, or refused."""

from pathlib import Path

import pytest
import torch

from slora_core.adapters.peft_weights import read_peft_adapter
from slora_core.errors import InvalidAdapterError
from tests.factories import make_random_adapter
from tests.slora_core.adapters.adapter_files import read_tensors, write_tensors

WRAPPERS = {
    "adapter name": lambda name: name.replace(".weight", ".default.weight"),
    "torch.compile": lambda name: name.replace(
        "model.model.layers", "model._orig_mod.model.layers"
    ),
    "torch.compile first": lambda name: "_orig_mod." + name,
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "DDP": lambda name: "module." + name,
    "FSDP": lambda name: name.replace("self_attn", "_fsdp_wrapped_module.self_attn"),
    "checkpoints": lambda name: name.replace(".0.", ".0._checkpoint_wrapped_module."),
    "language_model": lambda name: name.replace("model.layers", "model.language_model.layers"),
    "language_model.model": lambda name: name.replace(
        "model.model.layers", "model.language_model.model.layers"
    ),
    "several": lambda name: name.replace(".weight", ".default.weight").replace(
        "model.layers", "_orig_mod.language_model.model.layers"
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_known_wrappers_are_taken_off(tmp_path: Path, model_dir: Path, geometry, wrap) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    before = read_peft_adapter(adapter, geometry)[1]
    tensors = read_tensors(adapter)
    wrapped = {wrap(name): tensor for name, tensor in tensors.items()}
    assert wrapped.keys() != tensors.keys()
    write_tensors(adapter, wrapped)
    after = read_peft_adapter(adapter, geometry)[1]
    assert after.keys() == before.keys()
    for key in after:
        assert torch.equal(after[key].a, before[key].a) and torch.equal(after[key].b, before[key].b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name: name.replace("model.model.layers", "model.talker.model.layers"),
            "inside 'talker', a wrapper that is not known",
        ),
        (
            lambda name: name.replace("model.layers", "model.visual.encoder.layers"),
            "inside 'model.visual.encoder', a wrapper that is not known",
        ),
    ],
)
def test_another_wrapper_is_named(tmp_path, model_dir, geometry, change, message) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    write_tensors(adapter, {change(k): v for k, v in read_tensors(adapter).items()})
    with pytest.raises(InvalidAdapterError, match=message):
        read_peft_adapter(adapter, geometry)


@pytest.mark.parametrize(
    "twin",
    [
        lambda name: name.replace(".weight", ".other.weight"),
        lambda name: name.replace("model.model.layers", "model.language_model.model.layers"),
    ],
)
def test_two_adapters_or_two_models_in_one_file_are_refused(
    tmp_path, model_dir, geometry, twin
) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    tensors = read_tensors(adapter)
    write_tensors(adapter, tensors | {twin(name): t.clone() for name, t in tensors.items()})
    with pytest.raises(InvalidAdapterError, match="is for a module that .* names too"):
        read_peft_adapter(adapter, geometry)
