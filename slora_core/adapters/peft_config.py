"""Reading of `adapter_config.json` as PEFT writes it.

Owns what of PEFT's LoRA is supported and the refusals that name a field. It reads no weights:
which modules an adapter has is decided by its tensors (`peft_weights`), so `target_modules`,
`exclude_modules` and `layers_to_transform` are accepted in every form and checked for type only.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from slora_core.adapters.adapter_rules import UnknownFields
from slora_core.adapters.module_patterns import ModulePatterns, PatternError
from slora_core.adapters.peft_fields import (
    INERT_FIELDS,
    INERT_INITS,
    READ_FIELDS,
    REFUSED_FIELDS,
)
from slora_core.config import MAX_RANK
from slora_core.errors import InvalidAdapterError

CONFIG_FILE = "adapter_config.json"

T = TypeVar("T")


@dataclass(frozen=True)
class PeftLoraConfig:
    """The part of a PEFT `LoraConfig` that a trained adapter's output depends on."""

    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    ranks: ModulePatterns[int] = field(default_factory=lambda: ModulePatterns({}))
    alphas: ModulePatterns[float] = field(default_factory=lambda: ModulePatterns({}))
    # Modules that training saved whole, by their names in the config.
    modules_to_save: tuple[str, ...] = ()
    base_model: str | None = None
    # Of what is accepted and should be known.
    warnings: tuple[str, ...] = ()

    def rank_of(self, *module_names: str) -> int:
        """Rank of a module by its names, as in the base model (`model.layers.0.self_attn.q_proj`).

        The first name for which there is a pattern counts.
        """
        return _first(self.ranks, module_names, self.r)

    def scaling_of(self, *module_names: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, of a module as of `rank_of`."""
        alpha = _first(self.alphas, module_names, self.lora_alpha)
        rank = self.rank_of(*module_names)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _first(patterns: ModulePatterns[T], module_names: Sequence[str], default: T) -> T:
    for name in module_names if len(patterns) else ():
        value = patterns.value_of(name)
        if value is not None:
            return value
    return default


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


def parse_peft_config(data: bytes, unknown_fields: UnknownFields = "refuse") -> PeftLoraConfig:
    """`read_peft_config` of the file's bytes.

    Args:
        unknown_fields: whether a field that no known version of PEFT has is refused, or a warning.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapterError(f"{CONFIG_FILE} is not valid JSON: {error}") from None
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
        ranks=_patterns(fields, "rank_pattern", _rank),
        alphas=_patterns(fields, "alpha_pattern", _alpha),
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
    version = fields.get("peft_version")
    writer = f"PEFT {version}" if isinstance(version, str) else "an unknown version of PEFT"
    warnings = []
    for name, value in fields.items():
        if name in known or not value:
            continue
        error = _field_error(
            name,
            value,
            f"this field, written by {writer[:40]}, is not known, so it may change the output; "
            "with unknown_adapter_fields: warn such adapters are served",
        )
        if unknown_fields == "refuse":
            raise error
        warnings.append(f"{name} in {CONFIG_FILE} is not known and was ignored")
    return tuple(warnings)


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


def _patterns(
    fields: dict[str, Any], name: str, check: Callable[[str, Any], T]
) -> ModulePatterns[T]:
    """A `*_pattern` field, its values checked and its keys compiled."""
    patterns = fields.get(name)
    if patterns is None:
        return ModulePatterns({})
    if not isinstance(patterns, dict):
        raise _field_error(name, patterns, "it must map module names to numbers")
    values = {key: check(f"{name}[{key[:80]!r}]", value) for key, value in patterns.items()}
    try:
        return ModulePatterns(values)
    except PatternError as error:
        raise _field_error(name, patterns, str(error)) from None


def _field_error(name: str, value: Any, reason: str) -> InvalidAdapterError:
    shown = json.dumps(value, default=str)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return InvalidAdapterError(f"{name} in {CONFIG_FILE} is {shown}: {reason}")
