"""Names of tensors in an adapter's file: which module's A or B, or which whole tensor, each is.

PEFT's own form is `base_model.model.<module>.lora_A.weight`. Training adds to it: the name of the
adapter, and the wrappers that the model had on. Those that change nothing are taken off. It knows
no shapes; `peft_weights` checks them.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.errors import InvalidAdapterError
from slora_core.quoting import plain

# Parts of names by which torch.compile, FSDP, activation checkpoints, DDP and multimodal models
# wrap the model that is served here.
WRAPPERS = frozenset(
    {
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "module",
        "language_model",
    }
)

# PEFT's own prefix and the one of a model that lacks PEFT's first part.
_PREFIX = "base_model.model."
_SHORT_PREFIX = "model."
_LAYER = r"layers\.(?P<layer>0|[1-9]\d{0,8})"
_PATH = r"(?P<path>\w+\.\w+)"
# The adapter's own name, "default" in PEFT, may stand before "weight".
_MATRIX = r"lora_(?P<matrix>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
_LORA = re.compile(rf"(?P<module>(?:model\.)?{_LAYER}\.{_PATH})\.{_MATRIX}", re.ASCII)
_WHOLE = re.compile(
    r"(?:model\.)?(?P<tensor>embed_tokens|lm_head)(?:\.modules_to_save(?:\.[^.]+)?|\.base_layer)?\.weight"
)
# A module of the served model inside of something, or with something inside of its layer.
_WRAPPED = re.compile(
    rf"(?P<outer>(?:[^.]+\.)*?){_LAYER}\.(?P<inner>(?:[^.]+\.)*?){_PATH}\.{_MATRIX}", re.ASCII
)
# Longer ones cost the expression above more than they can mean.
_MAX_NAME_CHARS = 512


class LoraTensorName(NamedTuple):
    """Of an A or B."""

    layer: int
    # Index in the geometry's modules.
    module: int
    matrix: str
    # As in the base model, and as in training, wrappers included.
    module_name: str
    trained_name: str
    # The adapter's name in the file, "" where it has none.
    adapter: str


class WholeTensorName(NamedTuple):
    """Of the embeddings or the output head as a whole."""

    # "embed_tokens" or "lm_head".
    tensor: str


def parse_tensor_name(name: str, geometry: AdapterGeometry) -> LoraTensorName | WholeTensorName:
    """What a tensor of an adapter's file is.

    Raises:
        InvalidAdapterError: nothing that is supported, or of a module that the base model lacks.
    """
    if len(name) > _MAX_NAME_CHARS:
        raise _not_supported(name, "", geometry)
    trained_name = _without_prefix(name)
    # Wrappers may stand before PEFT's own prefix, and within it.
    bare = _without_prefix(".".join(part for part in name.split(".") if part not in WRAPPERS))
    whole = _WHOLE.fullmatch(bare)
    if whole is not None:
        return WholeTensorName(whole["tensor"])
    match = _LORA.fullmatch(bare)
    if match is None or match["path"] not in geometry.modules:
        raise _not_supported(name, bare, geometry)
    layer, module = int(match["layer"]), geometry.modules.index(match["path"])
    if layer >= geometry.num_layers:
        raise InvalidAdapterError(
            f"tensor {plain(name)} is for layer {layer}; the base model has layers 0 to "
            f"{geometry.num_layers - 1}"
        )
    if geometry.module_dims[layer][module] is None:
        raise InvalidAdapterError(
            f"tensor {plain(name)} is for {match['path']}, which the base model's layer {layer} "
            "lacks"
        )
    trained_module = trained_name.rsplit(".lora_", 1)[0]
    return LoraTensorName(
        layer, module, match["matrix"], match["module"], trained_module, match["adapter"] or ""
    )


def sort_names(
    names: Iterable[str], geometry: AdapterGeometry
) -> tuple[dict[str, LoraTensorName], dict[str, WholeTensorName]]:
    """What every tensor of a file is, by its name, none of them twice.

    Raises:
        InvalidAdapterError: as `parse_tensor_name`; or the file holds more than one adapter.
    """
    parsed = {name: parse_tensor_name(name, geometry) for name in sorted(names)}
    lora = {name: found for name, found in parsed.items() if isinstance(found, LoraTensorName)}
    whole = {name: found for name, found in parsed.items() if isinstance(found, WholeTensorName)}
    _check_one_adapter(lora)
    _check_one_meaning(lora)
    return lora, whole


def _check_one_adapter(names: Mapping[str, LoraTensorName]) -> None:
    firsts: dict[str, str] = {}
    for name, parsed in names.items():
        firsts.setdefault(parsed.adapter, name)
    if len(firsts) > 1:
        owners = [
            f"adapter '{plain(adapter)}'" if adapter else "an unnamed one" for adapter in firsts
        ]
        told = [
            f"tensor {plain(name)} of {owner}"
            for name, owner in zip(firsts.values(), owners, strict=True)
        ][:2]
        raise InvalidAdapterError(f"the file must hold one adapter and has {' and '.join(told)}")


def _check_one_meaning(names: Mapping[str, LoraTensorName]) -> None:
    """Both `model.layers` (a causal model) and `layers` (its body alone) name a module."""
    firsts: dict[tuple[int, int], tuple[str, str]] = {}
    seen: set[tuple[int, int, str]] = set()
    for name, parsed in names.items():
        half = parsed.layer, parsed.module, parsed.matrix
        first, trained_name = firsts.setdefault(half[:2], (name, parsed.trained_name))
        if half in seen or parsed.trained_name != trained_name:
            raise InvalidAdapterError(
                f"tensor {plain(name)} is for a module that {plain(first)} names too: one of them "
                "is of another adapter, or of a copy"
            )
        seen.add(half)


def _without_prefix(name: str) -> str:
    if name.startswith(2 * _SHORT_PREFIX):
        return name.removeprefix(_SHORT_PREFIX)
    return name.removeprefix(_PREFIX)


def _not_supported(name: str, bare: str, geometry: AdapterGeometry) -> InvalidAdapterError:
    shown, supported = plain(name), ", ".join(geometry.module_names)
    wrapped = _WRAPPED.fullmatch(bare)
    if wrapped is not None and wrapped["path"] in geometry.modules:
        around = f".{wrapped['outer']}".removesuffix(".model.").strip(".")
        wrapper = around or wrapped["inner"].rstrip(".")
        return InvalidAdapterError(
            f"tensor {shown} is of a module with '{plain(wrapper)}' around or in it, a wrapper "
            f"that is not known; taken off are {', '.join(sorted(WRAPPERS))}"
        )
    if "embed" in name or "lm_head" in name:
        return InvalidAdapterError(
            f"tensor {shown} is for the embeddings or the output head, which adapters cannot "
            f"change here; supported modules are {supported}"
        )
    return InvalidAdapterError(
        f"tensor {shown} is not LoRA A or B of a supported module: {supported}"
    )
