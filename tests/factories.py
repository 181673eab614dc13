"""Tiny random models and PEFT adapters on disk, for tests and benchmarks.

Everything is a function of its seed. `make_adapter` lets PEFT write the files, so their format is
PEFT's own; `make_random_adapter` writes the same two files without PEFT, fast enough for hundreds.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from slora_core.adapters.page_layout import AdapterGeometry

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
ALL_MODULES = ATTENTION_MODULES + MLP_MODULES
QV_MODULES = ("q_proj", "v_proj")
# What phi3 has of these as one matrix.
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}

MODEL_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")

# `rope_scaling=LLAMA3_ROPE` makes a Llama whose positions pass the original context early.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_TINY_SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    # Not a multiple of 64, so that padded rows are exercised.
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

_FAMILY_SHAPE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    # Qwen3 fixes head_dim apart from hidden_size / num_attention_heads.
    "qwen3": {"head_dim": 32, "use_sliding_window": False},
    # Half of each head is turned.
    "phi3": {"head_dim": 32, "partial_rotary_factor": 0.5, "sliding_window": None},
}


def family_modules(family: str, modules: Sequence[str] = ALL_MODULES) -> tuple[str, ...]:
    """What a family calls the modules that Llama calls `modules`; of one that is fused, once."""
    if family != "phi3":
        return tuple(modules)
    return tuple(dict.fromkeys(_FUSED.get(module, module) for module in modules))


def family_options(family: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `make_adapter` that name Llama's modules, in the names of a family."""
    named = dict(options)
    named["target_modules"] = family_modules(family, options.get("target_modules", QV_MODULES))
    for field in named.keys() & {"rank_pattern", "alpha_pattern"}:
        # A key is a module, maybe after a path.
        paths = {key: key.rpartition(".") for key in options[field]}
        named[field] = {
            "".join((*paths[key][:2], *family_modules(family, paths[key][2:]))): value
            for key, value in options[field].items()
        }
    return named


def make_model(
    path: str | Path, family: str = "llama", seed: int = 0, *, std: float = 0.15, **shape: Any
) -> Path:
    """Write a random fp32 model directory (config.json, model.safetensors) and return its path.

    `family` is one of `MODEL_FAMILIES`; `shape` overrides fields of the Hugging Face config, for
    instance `tie_word_embeddings=True` or `rope_scaling=LLAMA3_ROPE`.
    """
    from transformers import AutoModelForCausalLM

    config = _make_config(family, shape)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.1 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                # Large logits keep clear of ties; tied embeddings that large would echo the input.
                parameter.copy_(noise * (std if config.tie_word_embeddings else 4 * std))
            else:
                parameter.copy_(noise * std)
    model.save_pretrained(path)
    return Path(path)


def make_adapter(
    path: str | Path,
    model: Any,
    seed: int = 0,
    *,
    rank: int = 8,
    target_modules: Sequence[str] | str = QV_MODULES,
    alpha: float | None = None,
    scale: float = 0.15,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
    **lora_config: Any,
) -> Path:
    """Write an adapter through PEFT, with normal A and B of standard deviation `scale`.

    `model` is a model directory, a Hugging Face config or a loaded model (left unchanged).
    `alpha` defaults to twice the rank; `lora_config` goes to `peft.LoraConfig` as it is.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_config(_hf_config(model)).to(torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        layers_to_transform=(
            layers_to_transform
            if layers_to_transform is None or isinstance(layers_to_transform, int)
            else list(layers_to_transform)
        ),
        **lora_config,
    )
    peft_model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    peft_model.save_pretrained(path)
    return Path(path)


def make_random_adapter(
    path: str | Path,
    model: Any,
    seed: int = 0,
    *,
    rank: int = 8,
    target_modules: Sequence[str] = QV_MODULES,
    alpha: float | None = None,
    scale: float = 0.15,
    use_rslora: bool = False,
    dtype: torch.dtype = torch.float32,
    **config_fields: Any,
) -> Path:
    """Write the two files of a PEFT adapter without PEFT; all layers, one rank.

    `model` is a model directory or a Hugging Face config; `config_fields` are written into
    adapter_config.json as they are.
    """
    from safetensors.torch import save_file

    hf_config = _hf_config(model)
    dims = module_dims(hf_config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(hf_config.num_hidden_layers):
        for module in target_modules:
            prefix = f"base_model.model.model.layers.{layer}.{_path(module)}"
            in_features, out_features = dims[module]
            a = torch.randn(rank, in_features, generator=generator) * scale
            b = torch.randn(out_features, rank, generator=generator) * scale
            tensors[f"{prefix}.lora_A.weight"] = a.to(dtype)
            tensors[f"{prefix}.lora_B.weight"] = b.to(dtype)
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "lora_dropout": 0.0,
        "target_modules": list(target_modules),
        "use_rslora": use_rslora,
        **config_fields,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return directory


def make_geometry(
    model: Any, *, page_tokens: int = 16, dtype: torch.dtype = torch.float32
) -> AdapterGeometry:
    """The `AdapterGeometry` of a model directory or Hugging Face config."""
    hf_config = _hf_config(model)
    dims = module_dims(hf_config)
    kv_dim = hf_config.num_key_value_heads * _head_dim(hf_config)
    page_elems = 2 * page_tokens * kv_dim
    return uniform_geometry(hf_config.num_hidden_layers, page_elems, dims, dtype)


def uniform_geometry(
    num_layers: int,
    page_elems: int,
    dims: Mapping[str, tuple[int, int]],
    dtype: torch.dtype = torch.float32,
) -> AdapterGeometry:
    """Of a model whose layers are alike: (in_features, out_features) of its modules by name."""
    return AdapterGeometry(
        page_elems=page_elems,
        modules=tuple(_path(module) for module in dims),
        module_dims=(tuple(dims.values()),) * num_layers,
        dtype=dtype,
    )


def module_dims(hf_config: Any) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every LoRA target of a model of one of the families."""
    hidden, inner = hf_config.hidden_size, hf_config.intermediate_size
    q_dim = hf_config.num_attention_heads * _head_dim(hf_config)
    kv_dim = hf_config.num_key_value_heads * _head_dim(hf_config)
    if hf_config.model_type == "phi3":
        return {
            "qkv_proj": (hidden, q_dim + 2 * kv_dim),
            "o_proj": (q_dim, hidden),
            "gate_up_proj": (hidden, 2 * inner),
            "down_proj": (inner, hidden),
        }
    return {
        "q_proj": (hidden, q_dim),
        "k_proj": (hidden, kv_dim),
        "v_proj": (hidden, kv_dim),
        "o_proj": (q_dim, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def _head_dim(hf_config: Any) -> int:
    return (
        getattr(hf_config, "head_dim", None)
        or hf_config.hidden_size // hf_config.num_attention_heads
    )


def _path(module: str) -> str:
    """A module as its name ends in a layer."""
    is_attention = module in (*ATTENTION_MODULES, "qkv_proj")
    return f"{'self_attn' if is_attention else 'mlp'}.{module}"


def _make_config(family: str, shape: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    fields = {**_TINY_SHAPE, **_FAMILY_SHAPE[family], **shape}
    rope_scaling = fields.pop("rope_scaling", None)
    if rope_scaling is not None:
        theta = fields.pop("rope_theta", 10000.0)
        fields["rope_parameters"] = {"rope_theta": theta, **rope_scaling}
    return AutoConfig.for_model(family, **fields)


def _hf_config(model: Any) -> Any:
    from transformers import AutoConfig

    if isinstance(model, str | Path):
        return AutoConfig.from_pretrained(model)
    return getattr(model, "config", model)
