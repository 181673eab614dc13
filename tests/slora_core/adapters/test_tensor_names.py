"""Tensors that training named through wrappers are read as PEFT would name them, or refused."""

from pathlib import Path

import pytest
import torch

from slora_core.adapters.peft_weights import read_peft_adapter
from slora_core.adapters.tensor_names import parse_tensor_name
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
    "no base_model": lambda name: name.removeprefix("base_model."),
    "no base_model, torch.compile": lambda name: name.replace("base_model.", "_orig_mod."),
    "a body alone": lambda name: name.replace("model.model.layers", "model.layers"),
    "named with a dash": lambda name: name.replace(".weight", ".my-adapter.weight"),
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
            "with 'talker' around or in it, a wrapper that is not known",
        ),
        (
            lambda name: name.replace("model.layers", "model.visual.encoder.layers"),
            "with 'model.visual.encoder' around or in it, a wrapper that is not known",
        ),
        (lambda name: name.replace(".self_attn.", ".block.self_attn."), "with 'block' around or"),
        (
            lambda name: name.replace(".self_attn.", ".block.\n.self_attn."),
            r"with 'block.\\n' around or",
        ),
        (lambda name: name.replace("model.model.model", "model"), "with 'base_model' around or"),
    ],
)
def test_another_wrapper_is_named(tmp_path, model_dir, geometry, change, message) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    write_tensors(adapter, {change(k): v for k, v in read_tensors(adapter).items()})
    with pytest.raises(InvalidAdapterError, match=message):
        read_peft_adapter(adapter, geometry)


@pytest.mark.parametrize(
    ("twin", "told"),
    [
        (
            lambda name: name.replace(".weight", ".other.weight"),
            "has tensor .* of adapter 'other' and tensor .* of an unnamed one",
        ),
        (
            lambda name: name.replace("model.model.layers", "model.language_model.model.layers"),
            "is for a module that .* names too",
        ),
        (lambda name: name.removeprefix("base_model."), "is for a module that .* names too"),
    ],
)
def test_two_adapters_or_two_models_in_one_file_are_refused(
    tmp_path, model_dir, geometry, twin, told
) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    tensors = read_tensors(adapter)
    write_tensors(adapter, tensors | {twin(name): t.clone() for name, t in tensors.items()})
    with pytest.raises(InvalidAdapterError, match=told):
        read_peft_adapter(adapter, geometry)


def test_two_adapters_on_different_modules_are_refused(tmp_path, model_dir, geometry) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    tensors = {
        name.replace(".weight", ".one.weight" if "q_proj" in name else ".two.weight"): tensor
        for name, tensor in read_tensors(adapter).items()
    }
    write_tensors(adapter, tensors)
    with pytest.raises(InvalidAdapterError) as error:
        read_peft_adapter(adapter, geometry)
    prefix = "base_model.model.model.layers.0.self_attn"
    assert str(error.value) == (
        f"the file must hold one adapter and has tensor {prefix}.q_proj.lora_A.one.weight of "
        f"adapter 'one' and tensor {prefix}.v_proj.lora_A.two.weight of adapter 'two'"
    )


@pytest.mark.parametrize(
    "name",
    ["x" * 10**5, "layers.0." * 10**4, "\ud800\n", "", ".", "layers.1\u0663.self_attn.q_proj"]
    + ["base_model.model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "a." * 250],
)
def test_odd_names_are_refused_in_a_line(geometry, name: str) -> None:
    with pytest.raises(InvalidAdapterError) as error:
        parse_tensor_name(name, geometry)
    message = str(error.value)
    assert message.isprintable() and len(message) < 500
