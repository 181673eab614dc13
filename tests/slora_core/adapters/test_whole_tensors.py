"""Embeddings and heads in an adapter's file: copies are ignored, trained ones refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slora_core.adapters.adapter_rules import AdapterRules, CheckedTensors
from slora_core.adapters.peft_weights import read_peft_adapter
from slora_core.adapters.whole_tensors import BaseModelTensors
from slora_core.errors import InvalidAdapterError
from tests.factories import make_geometry, make_model, make_random_adapter
from tests.slora_core.adapters.adapter_files import read_tensors, write_tensors


class TestWholeTensors:
    """Embeddings and heads in the adapter's file."""

    @pytest.fixture
    def adapter(self, tmp_path: Path, model_dir: Path) -> Path:
        return make_random_adapter(tmp_path / "a", model_dir)

    @pytest.fixture
    def base(self, model_dir: Path) -> dict[str, torch.Tensor]:
        return load_file(model_dir / "model.safetensors")

    @staticmethod
    def _add(adapter: Path, **tensors: torch.Tensor) -> None:
        added = {
            f"base_model.model.{name.replace('__', '.')}.weight": tensor.clone()
            for name, tensor in tensors.items()
        }
        write_tensors(adapter, read_tensors(adapter) | added)

    @staticmethod
    def _set_config(adapter: Path, **fields: object) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def test_named_in_the_config_and_not_saved(self, adapter, geometry) -> None:
        self._set_config(adapter, modules_to_save=["lm_head"])
        summary, weights = read_peft_adapter(adapter, geometry)
        assert weights
        assert summary.warnings == (
            "modules_to_save in adapter_config.json names lm_head, of which the file has no tensor",
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_copies_are_ignored_with_a_note(self, adapter, model_dir, geometry, base, dtype):
        expected = read_peft_adapter(adapter, geometry)[1]
        self._add(
            adapter,
            model__embed_tokens=base["model.embed_tokens.weight"].to(dtype),
            lm_head__modules_to_save=base["lm_head.weight"].to(dtype),
        )
        self._set_config(adapter, modules_to_save=["lm_head"])
        tensors = BaseModelTensors(model_dir)
        for _ in range(2):
            summary, weights = read_peft_adapter(
                adapter, geometry, AdapterRules(base_tensors=tensors)
            )
            assert weights.keys() == expected.keys()
            assert len(summary.warnings) == 2
            assert all("is a copy of the base model's and was" in w for w in summary.warnings)

    @pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("loaded_in", [None, torch.bfloat16, torch.float16])
    def test_copies_in_another_type_or_by_way_of_one(self, tmp_path, dtype, base_dtype, loaded_in):
        model = make_model(tmp_path / "model")
        # Such as each type rounds otherwise.
        head = torch.linspace(-3, 3, 7 * 64).exp().view(7, 64).to(base_dtype)
        save_file({"lm_head.weight": head}, model / "model.safetensors")
        tensors = BaseModelTensors(model)
        copy = head.to(loaded_in or base_dtype).to(dtype)
        assert tensors.differing_rows("lm_head", copy) == 0
        trained = copy.clone()
        trained[3, 5] *= 1.5
        assert tensors.differing_rows("lm_head", trained) == 1

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.bool])
    def test_a_type_that_is_none_of_weights_is_no_copy(self, adapter, model_dir, geometry, dtype):
        base = torch.zeros_like(load_file(model_dir / "model.safetensors")["lm_head.weight"])
        self._add(adapter, lm_head=base.to(dtype))
        rules = AdapterRules(base_tensors=BaseModelTensors(model_dir))
        with pytest.raises(InvalidAdapterError, match=r"lm_head.weight has dtype \w+: .*supported"):
            read_peft_adapter(adapter, geometry, rules)

    def test_the_same_bytes_in_another_shape_are_no_copy(self, model_dir, base) -> None:
        tensors = BaseModelTensors(model_dir)
        head = base["lm_head.weight"]
        assert tensors.differing_rows("lm_head", head) == 0
        assert tensors.differing_rows("lm_head", head.view(-1, 2 * head.shape[1])) is None
        assert tensors.differing_rows("lm_head", head.view(torch.float16)) is None

    def test_copies_are_compared_by_hash_from_the_second_on(self, adapter, model_dir, base):
        tensors = BaseModelTensors(model_dir)
        head = base["lm_head.weight"]
        assert tensors.differing_rows("lm_head", head) == 0
        tensors._model_dir = Path("/nowhere")
        assert tensors.differing_rows("lm_head", head) == 0

    def test_trained_rows_are_counted(self, adapter, model_dir, geometry, base) -> None:
        head = base["lm_head.weight"].clone()
        head[[3, 7, 200]] += 1
        self._add(adapter, lm_head=head)
        rules = AdapterRules(base_tensors=BaseModelTensors(model_dir))
        with pytest.raises(InvalidAdapterError, match=f"in 3 of {len(head)} rows"):
            read_peft_adapter(adapter, geometry, rules)

    def test_a_resized_vocabulary_is_refused(self, adapter, model_dir, geometry, base) -> None:
        head = base["lm_head.weight"]
        self._add(adapter, lm_head=torch.cat([head, head[:1]]))
        rules = AdapterRules(base_tensors=BaseModelTensors(model_dir))
        with pytest.raises(InvalidAdapterError, match="a vocabulary that training has resized"):
            read_peft_adapter(adapter, geometry, rules)

    def test_both_tensors_of_a_tied_model_are_copies_of_its_embeddings(self, tmp_path) -> None:
        model = make_model(tmp_path / "tied", tie_word_embeddings=True)
        geometry = make_geometry(model)
        embeddings = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
        rules = AdapterRules(base_tensors=BaseModelTensors(model))
        adapter = make_random_adapter(tmp_path / "a", model)
        self._add(adapter, lm_head=embeddings, model__embed_tokens=embeddings)
        assert len(read_peft_adapter(adapter, geometry, rules)[0].warnings) == 2
        self._add(adapter, lm_head=embeddings + 1)
        with pytest.raises(InvalidAdapterError, match="lm_head.weight differs from the base"):
            read_peft_adapter(adapter, geometry, rules)

    def test_who_has_checked_before_ignores_them(self, adapter, geometry, base) -> None:
        self._add(adapter, lm_head=base["lm_head.weight"] + 1)
        rules = AdapterRules(base_tensors=CheckedTensors())
        assert read_peft_adapter(adapter, geometry, rules)[1]
