"""Reading of `adapter_config.json` as PEFT writes it.

Owns what of PEFT's LoRA is supported and the refusals that name a field. It reads no weights:
which modules an adapter has is decided by its tensors (`peft_weights`), so `target_modules`,
`exclude_modules` and `layers_to_transform` are accepted in every form and checked for type only.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slora_core.config import MAX_RANK
from slora_core.errors import InvalidAdapterError

CONFIG_FILE = "adapter_config.json"

# Fields that change the computation or the base model, with what a user can do about it.
_REFUSED_FIELDS = {
    "use_dora": "DoRA adapters are not supported",
    "modules_to_save": "fully trained modules cannot be served beside a shared base model",
    "trainable_token_indices": "trained token embeddings are not supported",
    "layer_replication": "the base model's layers cannot be replicated for one adapter",
    "fan_in_fan_out": "transposed (Conv1D) base weights are not supported",
    "megatron_config": "Megatron adapters are not supported",
    "lora_bias": "a bias in LoRA B is not supported",
    "use_qalora": "QALoRA adapters are not supported",
    "target_parameters": "LoRA on bare parameters is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA is not supported",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
}

# Fields with no effect on a trained adapter's output: provenance, training, and settings of
# options that `init_lora_weights` or a refused field would have to switch on.
_INERT_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    }
)

_READ_FIELDS = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)

# Initializations that leave the base weights as they are. The others (pissa, olora, corda, loftq,
# lora_ga) subtract from them, so that such an adapter only fits a base of its own.
_INERT_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class PeftLoraConfig:
    """The part of a PEFT `LoraConfig` that a trained adapter's output depends on."""

    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module_name: str) -> int:
        """Rank of a module named as in the base model (`model.layers.0.self_attn.q_proj`)."""
        key = _first_match(self.rank_pattern, module_name)
        return self.r if key is None else self.rank_pattern[key]

    def scaling_of(self, module_name: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, of a module named as in the base model."""
        key = _first_match(self.alpha_pattern, module_name)
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        rank = self.rank_of(module_name)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_peft_config(directory: str | Path) -> PeftLoraConfig:
    """Read and check `directory`/adapter_config.json.

    Raises:
        InvalidAdapterError: no such file, not a JSON object, or a field (named) with a value
            that is unsupported or of the wrong type.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidAdapterError(
            f"cannot read {CONFIG_FILE} in {directory}: {error.strerror}"
        ) from None
    return parse_peft_config(data)


def parse_peft_config(data: bytes) -> PeftLoraConfig:
    """`read_peft_config` of the file's bytes."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapterError(f"{CONFIG_FILE} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidAdapterError(
            f"{CONFIG_FILE} must hold a JSON object, not a {type(fields).__name__}"
        )
    _refuse_unsupported(fields)
    _check_target_fields(fields)
    use_rslora = fields.get("use_rslora")
    if use_rslora is not None and not isinstance(use_rslora, bool):
        raise _field_error("use_rslora", use_rslora, "it must be true or false")
    return PeftLoraConfig(
        r=_rank("r", fields.get("r", 8)),
        lora_alpha=_alpha("lora_alpha", fields.get("lora_alpha", 8)),
        use_rslora=bool(use_rslora),
        rank_pattern={
            key: _rank(f"rank_pattern[{key!r}]", value)
            for key, value in _pattern(fields, "rank_pattern").items()
        },
        alpha_pattern={
            key: _alpha(f"alpha_pattern[{key!r}]", value)
            for key, value in _pattern(fields, "alpha_pattern").items()
        },
    )


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise _field_error("peft_type", fields.get("peft_type"), "only LORA is supported")
    if fields.get("bias") not in (None, "none"):
        raise _field_error("bias", fields["bias"], 'trained biases are not supported, only "none"')
    init = fields.get("init_lora_weights")
    if not any(init is known or (init == known and type(init) is str) for known in _INERT_INITS):
        raise _field_error(
            "init_lora_weights",
            init,
            "such an adapter changes the base weights; convert it to plain LoRA when saving "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...))",
        )
    for name, value in fields.items():
        if name in _READ_FIELDS or name in _INERT_FIELDS or not value:
            continue
        reason = _REFUSED_FIELDS.get(name, "this field is not known, so it may change the output")
        raise _field_error(name, value, reason)


def _check_target_fields(fields: dict[str, Any]) -> None:
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = fields.get(name)
        if value is not None and not isinstance(value, str) and not _list_of(value, str):
            raise _field_error(name, value, "it must be a string or a list of strings")
    layers = fields.get("layers_to_transform")
    if layers is not None and not _list_of([layers], int) and not _list_of(layers, int):
        raise _field_error(
            "layers_to_transform", layers, "it must be a layer index or a list of them"
        )


def _list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


def _rank(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise _field_error(name, value, f"it must be an integer from 1 to {MAX_RANK}")
    return value


def _alpha(name: str, value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        # A JSON integer may be longer than any float.
        try:
            alpha = float(value)
        except OverflowError:
            alpha = math.inf
        if math.isfinite(alpha):
            return alpha
    raise _field_error(name, value, "it must be a finite number")


def _pattern(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """The dict of a `*_pattern` field, its keys checked to be regular expressions."""
    pattern = fields.get(name)
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise _field_error(name, pattern, "it must map module names to numbers")
    for key in pattern:
        try:
            re.compile(_pattern_regex(key))
        except (re.error, RecursionError, OverflowError) as error:
            raise _field_error(name, key, f"not a regular expression: {error}") from None
    return pattern


def _first_match(pattern: Mapping[str, Any], module_name: str) -> str | None:
    """First key whose regular expression matches the whole name or a dotted tail of it.

    This is the rule of `peft.utils.other.get_pattern_key`, order of keys included.
    """
    return next((key for key in pattern if re.match(_pattern_regex(key), module_name)), None)


def _pattern_regex(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _field_error(name: str, value: Any, reason: str) -> InvalidAdapterError:
    shown = json.dumps(value, default=str)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return InvalidAdapterError(f"{name} in {CONFIG_FILE} is {shown}: {reason}")
