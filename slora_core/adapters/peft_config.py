"""Reading of `adapter_config.json` as PEFT writes it.

Owns what of PEFT's LoRA is supported and the refusals that name a field. It reads no weights:
which modules an adapter has is decided by its tensors (`peft_weights`), so `target_modules`,
`exclude_modules` and `layers_to_transform` are accepted in every form and checked for type only.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from slora_core.adapters.adapter_rules import UnknownFields
from slora_core.adapters.name_patterns import PatternError, check_keys, first_keys
from slora_core.adapters.peft_fields import (
    INERT_FIELDS,
    INERT_INITS,
    READ_FIELDS,
    REFUSED_FIELDS,
)
from slora_core.config import MAX_RANK
from slora_core.errors import InvalidAdapterError
from slora_core.quoting import plain, quoted

CONFIG_FILE = "adapter_config.json"
# The largest that PEFT writes, with a rank and an alpha for each module, has 0.2 MB.
MAX_CONFIG_BYTES = 1 << 20
# Of unknown fields that are told; an answer has no use for a thousand.
MAX_TOLD = 8

T = TypeVar("T")
# What a module may have been called where PEFT matched patterns, the likeliest first.
ModuleNames = tuple[str, ...]


@dataclass(frozen=True)
class PeftLoraConfig:
    """The part of a PEFT `LoraConfig` that a trained adapter's output depends on."""

    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    # Modules that training saved whole, by their names in the config.
    modules_to_save: tuple[str, ...] = ()
    base_model: str | None = None
    # Of what is accepted and should be known.
    warnings: tuple[str, ...] = ()

    def ranks(self, modules: Sequence[ModuleNames]) -> list[int]:
        """Of each module, by its names (`model.layers.0.self_attn.q_proj`).

        The first of a module's names that a key of the pattern is for counts.
        """
        return _values(self.rank_pattern, modules, self.r)

    def scalings(self, modules: Sequence[ModuleNames], ranks: Sequence[int]) -> list[float]:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, of modules of these ranks, as `ranks`."""
        alphas = _values(self.alpha_pattern, modules, self.lora_alpha)
        divisors = map(math.sqrt, ranks) if self.use_rslora else ranks
        return [alpha / divisor for alpha, divisor in zip(alphas, divisors, strict=True)]


def _values(pattern: Mapping[str, T], modules: Sequence[ModuleNames], default: T) -> list[T]:
    if not pattern:
        return [default] * len(modules)
    keys = first_keys(list(pattern), {name for names in modules for name in names})
    return [
        next((pattern[keys[name]] for name in names if name in keys), default) for names in modules
    ]


def parse_peft_config(data: bytes, unknown_fields: UnknownFields = "refuse") -> PeftLoraConfig:
    """Read and check the bytes of an adapter_config.json.

    Args:
        unknown_fields: whether a field that no known version of PEFT has is refused, or a warning.

    Raises:
        InvalidAdapterError: not a JSON object, or a field (named) with a value that is
            unsupported or of the wrong type.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapterError(f"{CONFIG_FILE} is not valid JSON: {plain(str(error))}") from None
    if not isinstance(fields, dict):
        raise InvalidAdapterError(
            f"{CONFIG_FILE} must hold a JSON object, not a {type(fields).__name__}"
        )
    _refuse_unsupported(fields)
    warnings = _check_unknown(fields, unknown_fields)
    _check_target_fields(fields)
    use_rslora = fields.get("use_rslora")
    if use_rslora is not None and not isinstance(use_rslora, bool):
        raise _field_error("use_rslora", use_rslora, "it must be true or false")
    base_model = fields.get("base_model_name_or_path")
    return PeftLoraConfig(
        r=_rank("r", fields.get("r", 8)),
        lora_alpha=_alpha("lora_alpha", fields.get("lora_alpha", 8)),
        use_rslora=bool(use_rslora),
        rank_pattern=_pattern(fields, "rank_pattern", _rank),
        alpha_pattern=_pattern(fields, "alpha_pattern", _alpha),
        modules_to_save=tuple(fields.get("modules_to_save") or ()),
        base_model=base_model if isinstance(base_model, str) else None,
        warnings=warnings,
    )


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise _field_error("peft_type", fields.get("peft_type"), "only LORA is supported")
    if fields.get("bias") not in (None, "none"):
        raise _field_error("bias", fields["bias"], 'trained biases are not supported, only "none"')
    init = fields.get("init_lora_weights")
    if not any(init is known or (init == known and type(init) is str) for known in INERT_INITS):
        raise _field_error(
            "init_lora_weights",
            init,
            "such an adapter changes the base weights; convert it to plain LoRA when saving "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...))",
        )
    for name, reason in REFUSED_FIELDS.items():
        if fields.get(name):
            raise _field_error(name, fields[name], reason)


def _check_unknown(fields: dict[str, Any], unknown_fields: UnknownFields) -> tuple[str, ...]:
    """Warnings of fields with a value that no known version of PEFT has.

    Raises:
        InvalidAdapterError: there is one, and they are refused.
    """
    known = READ_FIELDS | INERT_FIELDS | REFUSED_FIELDS.keys()
    unknown = [name for name, value in fields.items() if value and name not in known]
    if unknown and unknown_fields == "refuse":
        version = fields.get("peft_version")
        writer = f"PEFT {plain(version, 40)}" if isinstance(version, str) else "an unknown PEFT"
        raise _field_error(
            unknown[0],
            fields[unknown[0]],
            f"this field, written by {writer}, is not known, so it may change the output; "
            "with unknown_adapter_fields: warn such adapters are served",
        )
    told = [f"{plain(name)} in {CONFIG_FILE} is not known and was ignored" for name in unknown]
    if len(told) > MAX_TOLD:
        told[MAX_TOLD:] = [f"so were {len(told) - MAX_TOLD} more fields"]
    return tuple(told)


def _check_target_fields(fields: dict[str, Any]) -> None:
    modules_to_save = fields.get("modules_to_save")
    if modules_to_save is not None and not _list_of(modules_to_save, str):
        raise _field_error("modules_to_save", modules_to_save, "it must be a list of strings")
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


def _pattern(fields: dict[str, Any], name: str, check: Callable[[str, Any], T]) -> dict[str, T]:
    """A `*_pattern` field, its keys and values checked."""
    pattern = fields.get(name)
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise _field_error(name, pattern, "it must map module names to numbers")
    try:
        check_keys(pattern.keys())
    except PatternError as error:
        at_fault = pattern if error.key is None else error.key
        raise _field_error(name, at_fault, str(error)) from None
    return {key: check(f"{name}[{quoted(key)}]", value) for key, value in pattern.items()}


def _field_error(name: str, value: Any, reason: str) -> InvalidAdapterError:
    return InvalidAdapterError(f"{plain(name)} in {CONFIG_FILE} is {quoted(value)}: {reason}")
