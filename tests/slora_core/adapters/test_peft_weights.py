"""Adapter directories that PEFT wrote are read as PEFT means them; damaged ones are refused."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.row_alignment import row_elems
from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.adapters.peft_weights import (
    inspect_peft_adapter,
    load_packed_adapter,
    read_peft_adapter,
)
from slora_core.errors import InvalidAdapterError
from tests.factories import (
    ALL_MODULES,
    make_adapter,
    make_geometry,
    make_model,
    make_random_adapter,
)
from tests.slora_core.adapters.adapter_files import read_tensors, write_tensors

Q0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q0_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def _unpack(packed, geometry: AdapterGeometry):
    """{(layer, module): (A, B)} read back through the layout's offsets, element by element."""
    streams = packed.pages.transpose(0, 1).reshape(geometry.num_layers, -1)
    found = {}
    for layer in range(geometry.num_layers):
        for module, (in_features, out_features) in enumerate(geometry.module_dims[layer]):
            rank, offset_a, offset_b = packed.layout.offsets[layer, module].tolist()
            if rank == 0:
                continue
            matrices = []
            for offset, features in ((offset_a, in_features), (offset_b, out_features)):
                width = row_elems(features)
                rows = streams[layer, offset : offset + rank * width].view(rank, width)
                assert not rows[:, features:].any(), "padding is not zero"
                matrices.append(rows[:, :features])
            found[layer, module] = matrices[0], matrices[1].T
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 3, "target_modules": ALL_MODULES},
        {"target_modules": "all-linear", "use_rslora": True, "alpha": 24},
        {
            "rank": 4,
            "target_modules": ALL_MODULES,
            "rank_pattern": {"q_proj": 16, "layers.1.mlp.down_proj": 1},
            "alpha_pattern": {"self_attn.*": 5, "^model.layers.0.mlp.up_proj": 2.5},
        },
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "target_modules": ["down_proj"]},
        {"target_modules": r".*\.1\..*(o|gate)_proj"},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"init_lora_weights": "orthogonal", "lora_dropout": 0.1},
    ],
)
def test_delta_equals_pefts(tmp_path: Path, model_dir: Path, geometry, options) -> None:
    adapter = make_adapter(tmp_path / "adapter", model_dir, seed=5, **options)
    _check_deltas(adapter, model_dir, geometry)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["qkv_proj", "down_proj"], "rank_pattern": {"qkv_proj": 5}},
    ],
)
def test_delta_of_fused_modules_equals_pefts(tmp_path: Path, options) -> None:
    model_dir = make_model(tmp_path / "model", "phi3")
    adapter = make_adapter(tmp_path / "adapter", model_dir, seed=5, **options)
    _check_deltas(adapter, model_dir, make_geometry(model_dir))


def _check_deltas(adapter: Path, model_dir: Path, geometry: AdapterGeometry) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_dir)
    peft_model = PeftModel.from_pretrained(base, adapter)
    expected = {}
    for name, module in peft_model.named_modules():
        if hasattr(module, "lora_A"):
            parts = name.split(".")
            layer = int(parts[parts.index("layers") + 1])
            index = geometry.module_names.index(parts[-1])
            expected[layer, index] = module.get_delta_weight("default")

    packed = load_packed_adapter(adapter, geometry)
    found = _unpack(packed, geometry)
    assert found.keys() == expected.keys()
    for key, (a, b) in found.items():
        torch.testing.assert_close(b @ a * packed.layout.scaling[key], expected[key])


def test_summary_agrees_with_the_weights(tmp_path: Path, model_dir: Path, geometry) -> None:
    adapter = make_adapter(
        tmp_path / "adapter", model_dir, rank=4, rank_pattern={"v_proj": 9}, alpha=8
    )
    summary, weights = read_peft_adapter(adapter, geometry)
    assert summary.max_rank == 9
    scaling = {(i, m): 8 / (4, 9)[m == 2] for i in (0, 1) for m in (0, 2)}
    assert {key: lora.scaling for key, lora in weights.items()} == scaling
    for key, lora in weights.items():
        assert summary.layout.offsets[key][0] == lora.rank
        assert summary.layout.scaling[key] == pytest.approx(lora.scaling)
    assert summary.nbytes == summary.num_pages * geometry.page_bytes
    assert inspect_peft_adapter(adapter, geometry).adapter_id == summary.adapter_id


def test_identity_is_the_bytes_of_both_files(tmp_path: Path, model_dir: Path, geometry) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir, seed=1)
    same = make_random_adapter(tmp_path / "b", model_dir, seed=1)
    other_seed = make_random_adapter(tmp_path / "c", model_dir, seed=2)
    other_alpha = make_random_adapter(tmp_path / "d", model_dir, seed=1, alpha=3)
    ids = [
        inspect_peft_adapter(path, geometry).adapter_id
        for path in (adapter, same, other_seed, other_alpha)
    ]
    assert ids[0] == ids[1] and len(set(ids)) == 3
    config = (adapter / "adapter_config.json").read_bytes()
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    expected = hashlib.sha256(len(config).to_bytes(8, "little") + config + weights)
    assert ids[0] == expected.hexdigest()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_packed_pages_hold_the_files_tensors(data, tmp_path_factory, model_dir: Path) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    geometry = make_geometry(model_dir, page_tokens=data.draw(st.integers(1, 8)), dtype=dtype)
    modules = data.draw(st.lists(st.sampled_from(ALL_MODULES), min_size=1, unique=True))
    adapter = make_random_adapter(
        tmp_path_factory.mktemp("packed"),
        model_dir,
        seed=data.draw(st.integers(0, 99)),
        rank=data.draw(st.integers(1, 33)),
        target_modules=modules,
    )
    packed = load_packed_adapter(adapter, geometry)
    assert packed.pages.dtype == dtype
    found = _unpack(packed, geometry)
    assert len(found) == geometry.num_layers * len(modules)
    for name, tensor in read_tensors(adapter).items():
        parts = name.split(".")
        pair = found[int(parts[4]), ALL_MODULES.index(parts[6])]
        assert torch.equal(pair[parts[7] == "lora_B"], tensor.to(dtype))


def test_a_body_only_adapter_is_read(tmp_path: Path, model_dir: Path, geometry) -> None:
    """PEFT on a model without its head names modules `layers.N` instead of `model.layers.N`."""
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    before = read_peft_adapter(adapter, geometry)[1]
    tensors = read_tensors(adapter)
    write_tensors(adapter, {k.replace("model.layers", "layers"): v for k, v in tensors.items()})
    after = read_peft_adapter(adapter, geometry)[1]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key].a, before[key].a) for key in after)


def _renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[new] = tensors.pop(old)

    return change


def _set(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, value)


def _poked(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors[Q0_B][3, 1].fill_(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "matches no module"),
        (lambda t: t.pop(Q0_A), f"{Q0_B} has no partner: lora_A"),
        (lambda t: t.pop(Q0_B), f"{Q0_A} has no partner: lora_B"),
        (_set("extra", torch.zeros(2)), "tensor extra is not LoRA A or B"),
        (_renamed(Q0_A, Q0_A.replace("layers.0", "layers.2")), "layer 2; .*layers 0 to 1"),
        (_renamed(Q0_A, Q0_A.replace("layers.0", "layers.00")), "is not LoRA A or B"),
        (_renamed(Q0_A, Q0_A.replace("q_proj", "qkv_proj")), "qkv_proj.lora_A.weight is not LoRA"),
        (_renamed(Q0_A, Q0_A.replace("self_attn", "mlp")), "mlp.q_proj.lora_A.weight is not LoRA"),
        (_renamed(Q0_A, Q0_A.replace("lora_A", "lora_embedding_A")), "embeddings"),
        (
            _set("base_model.model.model.embed_tokens.weight", torch.zeros(2)),
            "the whole embed_tokens",
        ),
        (_set("base_model.model.lm_head.lora_A.weight", torch.zeros(2)), "output head"),
        (_set(Q0_A.replace("lora_A", "lora_magnitude_vector"), torch.zeros(2)), "magnitude"),
        (_set(Q0_B.replace("weight", "bias"), torch.zeros(2)), "bias is not LoRA"),
        (_set(Q0_A.replace("model.model.l", "model.l"), torch.zeros(8, 64)), "names too"),
        (_set(Q0_A, torch.zeros(8, 63)), r"shape \[8, 63\], expected \[8, 64\]"),
        (_set(Q0_A, torch.zeros(4, 64)), r"shape \[4, 64\], expected \[8, 64\]: rank 8"),
        (_set(Q0_B, torch.zeros(64, 8)), r"shape \[64, 8\], expected \[128, 8\]"),
        (_set(Q0_B, torch.zeros(128, 4)), r"shape \[128, 4\], expected \[128, 8\]"),
        (_set(Q0_A, torch.zeros(8, 64, 1)), r"shape \[8, 64, 1\]"),
        (_set(Q0_A, torch.zeros(0, 64)), r"shape \[0, 64\]"),
        (
            _set(Q0_A, torch.zeros(8, 64, dtype=torch.int32)),
            "dtype int32: not a float type; supported are float32, bfloat16",
        ),
        (
            _set(Q0_A, torch.zeros(8, 64).to(torch.float8_e4m3fn)),
            "dtype float8_e4m3fn: fp8 adapters are not supported; supported are float32, bfloat16",
        ),
        (_poked(float("nan")), f"{Q0_B} holds NaN"),
        (_poked(float("-inf")), f"{Q0_B} holds NaN or inf"),
    ],
)
def test_wrong_tensors_are_refused_by_name(
    tmp_path: Path, model_dir: Path, geometry, change, message: str
) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    tensors = read_tensors(adapter)
    change(tensors)
    write_tensors(adapter, tensors)
    for read in (inspect_peft_adapter, load_packed_adapter):
        with pytest.raises(InvalidAdapterError, match=message):
            read(adapter, geometry)


def test_a_value_that_overflows_the_servers_dtype_is_refused(tmp_path: Path, model_dir) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    tensors = read_tensors(adapter)
    _poked(1e6)(tensors)
    write_tensors(adapter, tensors)
    inspect_peft_adapter(adapter, make_geometry(model_dir, dtype=torch.bfloat16))
    with pytest.raises(InvalidAdapterError, match="too large for the server's torch.float16"):
        inspect_peft_adapter(adapter, make_geometry(model_dir, dtype=torch.float16))


def test_a_scaling_that_overflows_is_refused(tmp_path: Path, model_dir: Path, geometry) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir, alpha=1e300)
    with pytest.raises(InvalidAdapterError, match="lora_alpha .* too large"):
        inspect_peft_adapter(adapter, geometry)


def test_an_adapter_for_another_base_names_tensor_and_shapes(tmp_path: Path, geometry) -> None:
    other = make_model(tmp_path / "other", "llama", hidden_size=128, num_attention_heads=8)
    adapter = make_random_adapter(tmp_path / "a", other)
    with pytest.raises(InvalidAdapterError, match=r"tensor .* \[8, 128\], expected \[8, 64\]"):
        inspect_peft_adapter(adapter, geometry)


def test_modules_of_another_family_are_refused_with_those_there_are(tmp_path: Path) -> None:
    phi, llama = (make_model(tmp_path / family, family) for family in ("phi3", "llama"))
    adapter = make_random_adapter(tmp_path / "a", llama)
    supported = "qkv_proj, o_proj, gate_up_proj, down_proj$"
    with pytest.raises(InvalidAdapterError, match=rf"{Q0_A} is not .* module: {supported}"):
        inspect_peft_adapter(adapter, make_geometry(phi))


def test_a_module_that_a_layer_lacks_is_refused(tmp_path: Path, model_dir, geometry) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    first, second = geometry.module_dims
    without_q = replace(geometry, module_dims=(first, (None, *second[1:])))
    with pytest.raises(
        InvalidAdapterError,
        match=r"layers.1.self_attn.q_proj.* is for self_attn.q_proj, which .* layer 1 lacks",
    ):
        inspect_peft_adapter(adapter, without_q)


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_what_peft_itself_writes_for_refused_options(
    tmp_path: Path, model_dir: Path, geometry, field: str
) -> None:
    adapter = make_adapter(tmp_path / "a", model_dir, **{field: True})
    with pytest.raises(InvalidAdapterError, match=f"^{field} in adapter_config.json"):
        inspect_peft_adapter(adapter, geometry)


def test_a_header_of_a_million_tensors_is_not_parsed(tmp_path, model_dir, geometry) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    file = adapter / "adapter_model.safetensors"
    length = 2**22 + 1
    file.write_bytes(length.to_bytes(8, "little") + b" " * length)
    with pytest.raises(InvalidAdapterError, match="header of 4194305 bytes; at most 4194304"):
        inspect_peft_adapter(adapter, geometry)


def test_a_config_of_more_than_a_mebibyte_is_not_read(tmp_path, model_dir, geometry) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    file = adapter / "adapter_config.json"
    text = file.read_text()
    file.write_text(text + " " * (2**20 - len(text)))
    assert inspect_peft_adapter(adapter, geometry)
    file.write_text(text + " " * (2**20 - len(text) + 1))
    with pytest.raises(InvalidAdapterError, match="has 1048577 bytes; at most 1048576 are allowed"):
        inspect_peft_adapter(adapter, geometry)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, -1])
def test_truncated_weights_are_refused(
    tmp_path: Path, model_dir: Path, geometry, keep: int
) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InvalidAdapterError, match="damaged or truncated"):
        inspect_peft_adapter(adapter, geometry)


def _header(entries: object, data: bytes = b"\0" * 8) -> bytes:
    encoded = json.dumps(entries).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04K\x01." * 20,
        b"\xff" * 64,
        (1 << 62).to_bytes(8, "little") + b"{}",
        _header([]),
        _header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}),
        _header({"x": {"dtype": "NOPE", "shape": [2], "data_offsets": [0, 8]}}),
        _header({"x": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}),
        _header({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        _header({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}),
        _header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}),
    ],
)  # fmt: skip
def test_corrupt_weights_are_refused(tmp_path: Path, model_dir: Path, geometry, data) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    (adapter / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(InvalidAdapterError):
        inspect_peft_adapter(adapter, geometry)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_raise_anything_else(data, tmp_path_factory, model_dir: Path) -> None:
    adapter = make_random_adapter(tmp_path_factory.mktemp("flip"), model_dir, rank=1)
    file = adapter / data.draw(
        st.sampled_from(["adapter_model.safetensors", "adapter_config.json"])
    )
    content = bytearray(file.read_bytes())
    limit = min(len(content), 1500) - 1
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, limit))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with contextlib.suppress(InvalidAdapterError):
        inspect_peft_adapter(adapter, make_geometry(model_dir))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "weights.pkl"])
def test_pickles_are_refused_by_name(tmp_path: Path, model_dir: Path, geometry, name) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    (adapter / "adapter_model.safetensors").rename(adapter / name)
    with pytest.raises(InvalidAdapterError, match=f"has {name} and no adapter_model.safetensors"):
        inspect_peft_adapter(adapter, geometry)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_and_strange_files_are_refused(
    tmp_path: Path, model_dir: Path, geometry, name: str
) -> None:
    adapter = make_random_adapter(tmp_path / "a", model_dir)
    (adapter / name).unlink()
    with pytest.raises(InvalidAdapterError, match=f"has no {name}"):
        inspect_peft_adapter(adapter, geometry)
    os.mkfifo(adapter / name)
    with pytest.raises(InvalidAdapterError, match="not a regular file"):
        inspect_peft_adapter(adapter, geometry)
    (adapter / name).unlink()
    (adapter / name).mkdir()
    with pytest.raises(InvalidAdapterError, match="Is a directory"):
        inspect_peft_adapter(adapter, geometry)
    with pytest.raises(InvalidAdapterError, match="nowhere is not a directory"):
        inspect_peft_adapter(tmp_path / "nowhere", geometry)
