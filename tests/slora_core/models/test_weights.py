"""Checkpoints fill every weight exactly; what is left over, missing or misshapen is refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slora_core.errors import UnsupportedModelError
from slora_core.models.config import (
    DOWN,
    GATE_UP,
    INPUT_NORM,
    K_NORM,
    O_PROJ,
    POST_NORM,
    Q_NORM,
    QKV,
    ModelConfig,
)
from slora_core.models.registry import load_model_config
from slora_core.models.weights import (
    DUMMY_STD,
    DecoderWeights,
    checkpoint_views,
    dummy_weights,
    load_weights,
)
from tests.factories import MODEL_FAMILIES, make_model

Q0 = "model.layers.0.self_attn.q_proj.weight"
FILE = "model.safetensors"


def _load(path: Path, dtype: torch.dtype = torch.float32) -> tuple[ModelConfig, DecoderWeights]:
    config = load_model_config(path)
    return config, load_weights(path, config, "cpu", dtype)


def _change(path: Path, add: dict[str, torch.Tensor] | None = None, drop: str = "") -> None:
    tensors = load_file(path / FILE)
    tensors.pop(drop, None)
    save_file({**tensors, **(add or {})}, path / FILE)


@pytest.mark.parametrize("family", MODEL_FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_fused_weights_are_the_checkpoint(tmp_path: Path, family: str, tied: bool) -> None:
    path = make_model(tmp_path, family, tie_word_embeddings=tied)
    tensors = load_file(path / FILE)
    config, weights = _load(path)
    assert len(weights.layers) == config.num_layers
    for index, layer in enumerate(weights.layers):

        def joined(*names: str, index: int = index) -> torch.Tensor:
            return torch.cat([tensors[f"model.layers.{index}.{name}"] for name in names])

        qkv, o, gate_up, down = (layer.linears[x] for x in (QKV, O_PROJ, GATE_UP, DOWN))
        if family == "phi3":
            assert torch.equal(qkv.weight, joined("self_attn.qkv_proj.weight"))
            assert torch.equal(gate_up.weight, joined("mlp.gate_up_proj.weight"))
        else:
            assert torch.equal(qkv.weight, joined(*(f"self_attn.{x}_proj.weight" for x in "qkv")))
            assert torch.equal(gate_up.weight, joined("mlp.gate_proj.weight", "mlp.up_proj.weight"))
        assert torch.equal(o.weight, joined("self_attn.o_proj.weight"))
        assert torch.equal(down.weight, joined("mlp.down_proj.weight"))
        norms = layer.norms
        assert torch.equal(norms[INPUT_NORM], joined("input_layernorm.weight"))
        assert torch.equal(norms[POST_NORM], joined("post_attention_layernorm.weight"))
        if family == "qwen2":
            assert torch.equal(qkv.bias, joined(*(f"self_attn.{x}_proj.bias" for x in "qkv")))
        else:
            assert qkv.bias is None
        if family == "qwen3":
            assert torch.equal(norms[Q_NORM], joined("self_attn.q_norm.weight"))
            assert torch.equal(norms[K_NORM], joined("self_attn.k_norm.weight"))
        else:
            assert norms.keys() == {INPUT_NORM, POST_NORM}
        assert o.bias is gate_up.bias is down.bias is None
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"])
    assert torch.equal(weights.final_norm, tensors["model.norm.weight"])
    if tied:
        assert weights.lm_head.weight is weights.embedding
    else:
        assert torch.equal(weights.lm_head.weight, tensors["lm_head.weight"])


def test_biases_of_every_linear(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama", attention_bias=True, mlp_bias=True)
    tensors = load_file(path / FILE)
    _, weights = _load(path)
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        linears = layer.linears
        assert torch.equal(linears[O_PROJ].bias, tensors[f"{prefix}self_attn.o_proj.bias"])
        assert torch.equal(linears[DOWN].bias, tensors[f"{prefix}mlp.down_proj.bias"])
        assert torch.equal(
            linears[GATE_UP].bias,
            torch.cat([tensors[f"{prefix}mlp.{name}_proj.bias"] for name in ("gate", "up")]),
        )
        assert linears[QKV].bias.any()


def test_sharded_index(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    _, whole = _load(path)
    names = sorted(load_file(path / FILE))
    tensors = load_file(path / FILE)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, path / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (path / f"{FILE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / FILE).unlink()
    config, sharded = _load(path)
    expected = checkpoint_views(config, whole)
    for name, view in checkpoint_views(config, sharded).items():
        assert torch.equal(view, expected[name]), name

    (path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="model-2-of-2.safetensors does not exist"):
        _load(path)


def test_weights_are_converted(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    tensors = load_file(path / FILE)
    _, weights = _load(path, torch.bfloat16)
    o = weights.layers[0].linears[O_PROJ]
    assert o.weight.dtype == torch.bfloat16
    expected = tensors["model.layers.0.self_attn.o_proj.weight"].bfloat16()
    assert torch.equal(o.weight, expected)
    _change(path, {Q0: tensors[Q0].half()})
    _, weights = _load(path)
    assert torch.equal(weights.layers[0].linears[QKV].weight[:64], tensors[Q0].half().float())


def test_buffers_of_older_checkpoints_are_ignored(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    _change(path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    _load(path)


def test_a_tied_model_may_carry_its_head(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama", tie_word_embeddings=True)
    _change(path, {"lm_head.weight": torch.zeros(256, 64)})
    _, weights = _load(path)
    assert weights.lm_head.weight is weights.embedding and weights.embedding.any()


@pytest.mark.parametrize(
    "add,drop,message",
    [
        ({}, Q0, "lacks 1 tensors, 'model.layers.0.self_attn.q_proj.weight'"),
        ({}, "model.norm.weight", "lacks 1 tensors, 'model.norm.weight'"),
        ({}, "lm_head.weight", "lacks 1 tensors, 'lm_head.weight'"),
        ({"extra": (3,)}, "", "has the tensor 'extra'"),
        ({"model.layers.2.self_attn.q_proj.weight": (64, 64)}, "", "which a 2-layer decoder"),
        ({"model.layers.0.self_attn.q_proj.bias": (64,)}, "", "q_proj.bias"),
        ({Q0: (64, 32)}, "", r"has shape \(64, 32\); the config says \(64, 64\)"),
        ({Q0: (32, 64)}, "", r"has shape \(32, 64\)"),
        # Transposed: as many elements.
        ({"model.layers.0.mlp.down_proj.weight": (96, 64)}, "", r"has shape \(96, 64\)"),
        # A shape that would broadcast.
        ({Q0: (1, 64)}, "", r"has shape \(1, 64\)"),
    ],
)
def test_checkpoints_that_do_not_fit(tmp_path: Path, add: dict, drop: str, message: str) -> None:
    path = make_model(tmp_path, "llama")
    _change(path, {name: torch.zeros(shape) for name, shape in add.items()}, drop)
    with pytest.raises(UnsupportedModelError, match=message):
        _load(path)


def test_damaged_files(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    data = (path / FILE).read_bytes()
    header = struct.pack("<Q", len(data)) + b"{}"
    for damaged in (data[:-100], data[:20], b"", header):
        (path / FILE).write_bytes(damaged)
        with pytest.raises(UnsupportedModelError, match=f"{FILE} is damaged"):
            _load(path)
    (path / FILE).unlink()
    with pytest.raises(UnsupportedModelError, match=f"{FILE} does not exist"):
        _load(path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    path = make_model(tmp_path, "llama")
    torch.save(load_file(path / FILE), path / "pytorch_model.bin")
    (path / FILE).unlink()
    with pytest.raises(UnsupportedModelError, match="weights are read from safetensors"):
        _load(path)


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_dummy_weights(tmp_path: Path, family: str) -> None:
    config = load_model_config(make_model(tmp_path, family))
    weights = dummy_weights(config, "cpu", torch.float32, seed=1)
    again, other = (dummy_weights(config, "cpu", torch.float32, seed=seed) for seed in (1, 2))
    for name, view in checkpoint_views(config, weights).items():
        if "norm" in name:
            assert (view == 1).all()
        else:
            assert view.std() == pytest.approx(DUMMY_STD, rel=0.3), name
            assert torch.equal(view, checkpoint_views(config, again)[name])
            assert not torch.equal(view, checkpoint_views(config, other)[name])
