"""Names of tensors in an adapter's file: which module's A or B, or which whole tensor, each is.

PEFT's own form is `base_model.model.<module>.lora_A.weight`. Training adds to it: the name of the
adapter, and the wrappers that the model had on. Those that change nothing are taken off. It knows
no shapes; `peft_weights` checks them.
"""

import re
from typing import NamedTuple

from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.errors import InvalidAdapterError

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

_PREFIX = "base_model.model."
_MODULE = r"(?:model\.)?layers\.(?P<layer>0|[1-9]\d{0,8})\.(?P<path>\w+\.\w+)"
# The adapter's own name, "default" in PEFT, may stand before "weight".
_LORA = re.compile(rf"(?P<module>{_MODULE})\.lora_(?P<matrix>[AB])(?:\.(?P<adapter>\w+))?\.weight")
_WHOLE = re.compile(
    r"(?:model\.)?(?P<tensor>embed_tokens|lm_head)(?:\.modules_to_save(?:\.\w+)?|\.base_layer)?\.weight"
)
# A module of the served model inside of something.
_WRAPPED = re.compile(rf"(?P<wrapper>(?!model\.layers\.).+?)\.{_MODULE}\.lora_[AB](\.\w+)?\.weight")


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
    trained_name = name.removeprefix(_PREFIX)
    plain = ".".join(part for part in trained_name.split(".") if part not in WRAPPERS)
    # A wrapper may have stood before PEFT's own prefix.
    plain = plain.removeprefix(_PREFIX)
    whole = _WHOLE.fullmatch(plain)
    if whole is not None:
        return WholeTensorName(whole["tensor"])
    match = _LORA.fullmatch(plain)
    if match is None or match["path"] not in geometry.modules:
        raise _not_supported(name, plain, geometry)
    layer, module = int(match["layer"]), geometry.modules.index(match["path"])
    if layer >= geometry.num_layers:
        raise InvalidAdapterError(
            f"tensor {name} is for layer {layer}; the base model has layers 0 to "
            f"{geometry.num_layers - 1}"
        )
    if geometry.module_dims[layer][module] is None:
        raise InvalidAdapterError(
            f"tensor {name} is for {match['path']}, which the base model's layer {layer} lacks"
        )
    trained_module = trained_name.rsplit(".lora_", 1)[0]
    return LoraTensorName(
        layer, module, match["matrix"], match["module"], trained_module, match["adapter"] or ""
    )


def _not_supported(name: str, plain: str, geometry: AdapterGeometry) -> InvalidAdapterError:
    supported = ", ".join(geometry.module_names)
    if "embed" in name or "lm_head" in name:
        return InvalidAdapterError(
            f"tensor {name} is for the embeddings or the output head, which adapters cannot "
            f"change here; supported modules are {supported}"
        )
    wrapped = _WRAPPED.match(plain)
    if wrapped is not None and wrapped["path"] in geometry.modules:
        return InvalidAdapterError(
            f"tensor {name} is of a module inside {wrapped['wrapper']!r}, a wrapper that is not "
            f"known; taken off are {', '.join(sorted(WRAPPERS))}"
        )
    return InvalidAdapterError(
        f"tensor {name} is not LoRA A or B of a supported module: {supported}"
    )
