"""The factories write what Hugging Face and PEFT read, and outputs that tests can tell apart."""

from pathlib import Path

import pytest
import torch

from tests.factories import (
    LLAMA3_ROPE,
    MODEL_FAMILIES,
    family_modules,
    make_adapter,
    make_model,
    make_random_adapter,
)


def _generate(model, length: int = 24) -> list[int]:
    prompt = torch.tensor([[5, 9, 77, 130, 31]])
    with torch.no_grad():
        return model.generate(
            prompt, max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("family", MODEL_FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_model_loads_and_is_not_degenerate(tmp_path: Path, family: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    path = make_model(tmp_path / "model", family, seed=1, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.float32
    assert model.config.model_type == family
    assert len(set(_generate(model))) >= 6


def test_seed_decides_the_weights(tmp_path: Path) -> None:
    files = [
        make_model(tmp_path / str(i), "llama", seed=seed) / "model.safetensors"
        for i, seed in enumerate((1, 1, 2))
    ]
    first, same, other = (file.read_bytes() for file in files)
    assert first == same != other


def test_llama3_rope_is_written(tmp_path: Path) -> None:
    from transformers import AutoConfig

    path = make_model(tmp_path / "model", "llama", rope_scaling=LLAMA3_ROPE, rope_theta=5e5)
    rope = AutoConfig.from_pretrained(path).rope_parameters
    assert rope["rope_type"] == "llama3" and rope["factor"] == 8.0 and rope["rope_theta"] == 5e5


@pytest.mark.parametrize("family", MODEL_FAMILIES)
@pytest.mark.parametrize("make", [make_adapter, make_random_adapter])
def test_peft_loads_the_adapter_and_it_changes_the_text(tmp_path: Path, family: str, make) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = make_model(tmp_path / "model", family)
    modules = family_modules(family)
    adapter = make(tmp_path / "adapter", path, seed=4, rank=4, target_modules=modules)
    base = AutoModelForCausalLM.from_pretrained(path)
    before = _generate(base)
    model = PeftModel.from_pretrained(base, adapter)
    result = model.load_adapter(adapter, "again")
    assert not result.missing_keys and not result.unexpected_keys
    after = _generate(model)
    assert after != before
    assert len(set(after)) >= 6
