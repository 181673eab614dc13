"""Reading of an adapter directory that PEFT saved: checks, identity, weights.

Tensor names and shapes are the truth of which modules an adapter has. It packs nothing (see
`page_layout`) and never unpickles. The registry inspects with it, the host store reads with it.
Files are read whole before they are parsed, not mapped: one that somebody truncates meanwhile
then gives an error here instead of a SIGBUS, and the hash is of the very bytes that are used.
"""

import hashlib
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from slora_core.adapters.page_layout import (
    AdapterGeometry,
    AdapterLayout,
    LoraWeights,
    ModuleKey,
    PackedAdapter,
    pack_adapter,
    plan_layout,
)
from slora_core.adapters.peft_config import CONFIG_FILE, PeftLoraConfig, parse_peft_config
from slora_core.errors import InvalidAdapterError

WEIGHTS_FILE = "adapter_model.safetensors"

# What PEFT and others call the same weights in pickled form.
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# base_model.model. + the module's name in the base model + lora_A or lora_B.
_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<module_name>(?:model\.)?layers\.(?P<layer>0|[1-9]\d{0,8})\."
    r"(?P<path>\w+\.\w+))\.lora_(?P<matrix>[AB])\.weight"
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class AdapterSummary:
    """What an adapter needs and who it is, without its weights."""

    # sha256 over both files: the adapter's content hash.
    adapter_id: str
    layout: AdapterLayout
    # Bytes in page order.
    nbytes: int
    # What of its files is unusual and changes nothing in what is served.
    warnings: tuple[str, ...] = ()

    @property
    def max_rank(self) -> int:
        return self.layout.max_rank

    @property
    def num_pages(self) -> int:
        return self.layout.num_pages


def inspect_peft_adapter(directory: str | Path, geometry: AdapterGeometry) -> AdapterSummary:
    """Check an adapter directory against the base model and describe it.

    Raises:
        InvalidAdapterError: as `read_peft_adapter`.
    """
    return read_peft_adapter(directory, geometry)[0]


def load_packed_adapter(directory: str | Path, geometry: AdapterGeometry) -> PackedAdapter:
    """An adapter directory in page order in this process's own memory.

    Raises:
        InvalidAdapterError: as `read_peft_adapter`.
    """
    summary, weights = read_peft_adapter(directory, geometry)
    pages = pack_adapter(geometry, summary.layout, weights)
    return PackedAdapter(summary.adapter_id, summary.layout, pages)


def read_peft_adapter(
    directory: str | Path, geometry: AdapterGeometry
) -> tuple[AdapterSummary, dict[ModuleKey, LoraWeights]]:
    """Summary and weights of an adapter directory, both of one reading of its files.

    Raises:
        InvalidAdapterError: a file is missing, damaged or pickled; a config field is unsupported
            (named); a tensor (named) is of no supported module, lacks its partner, has a shape
            that the base model or the configured rank does not allow, or holds NaN or infinity.
    """
    directory = Path(directory)
    config_bytes = _read_file(directory, CONFIG_FILE)
    config = parse_peft_config(config_bytes)
    weights_bytes = _read_file(directory, WEIGHTS_FILE)
    # The config's length keeps the border between the files part of what is hashed.
    digest = hashlib.sha256(len(config_bytes).to_bytes(8, "little"))
    digest.update(config_bytes)
    digest.update(weights_bytes)
    weights = _check_tensors(_parse_safetensors(weights_bytes), config, geometry)

    ranks = {key: lora.rank for key, lora in weights.items()}
    scaling = {key: lora.scaling for key, lora in weights.items()}
    layout = plan_layout(geometry, ranks, scaling)
    summary = AdapterSummary(
        adapter_id=digest.hexdigest(),
        layout=layout,
        nbytes=layout.num_pages * geometry.page_bytes,
    )
    return summary, weights


def _read_file(directory: Path, name: str) -> bytes:
    path = directory / name
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidAdapterError(f"{path} is not a regular file")
            return file.read()
    except FileNotFoundError:
        raise _missing_file(directory, name) from None
    except OSError as error:
        raise InvalidAdapterError(f"cannot read {path}: {error.strerror}") from None


def _open_without_waiting(path: str, flags: int) -> int:
    # Without O_NONBLOCK the opening of a FIFO would wait for a writer for ever.
    return os.open(path, flags | os.O_NONBLOCK)


def _missing_file(directory: Path, name: str) -> InvalidAdapterError:
    if not directory.is_dir():
        return InvalidAdapterError(f"{directory} is not a directory")
    pickles = sorted(
        path.name for path in directory.iterdir() if path.suffix.lower() in _PICKLE_SUFFIXES
    )
    if name == WEIGHTS_FILE and pickles:
        return InvalidAdapterError(
            f"{directory} has {pickles[0]} and no {WEIGHTS_FILE}: pickled weights are never "
            "loaded, since they can run code; save the adapter with safe_serialization=True"
        )
    return InvalidAdapterError(f"{directory} has no {name}")


def _parse_safetensors(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    # Beside its own error the library lets a dtype that torch lacks through as the others.
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InvalidAdapterError(f"{WEIGHTS_FILE} is damaged or truncated: {error}") from None


def _check_tensors(
    tensors: Mapping[str, torch.Tensor], config: PeftLoraConfig, geometry: AdapterGeometry
) -> dict[ModuleKey, LoraWeights]:
    """Pair A and B of each module; every tensor is consumed or named in an error."""
    halves: dict[ModuleKey, dict[str, str]] = {}
    module_names: dict[ModuleKey, str] = {}
    for name in sorted(tensors):
        match = _parse_name(name, geometry)
        key = int(match["layer"]), geometry.modules.index(match["path"])
        # Both `model.layers` (a causal model) and `layers` (its body alone) name a module.
        if module_names.setdefault(key, match["module_name"]) != match["module_name"]:
            raise InvalidAdapterError(
                f"tensor {name} is for a module that {module_names[key]} names too"
            )
        halves.setdefault(key, {})[match["matrix"]] = name
    if not halves:
        raise InvalidAdapterError(
            f"{WEIGHTS_FILE} holds no tensors: the adapter matches no module of the base model"
        )
    weights = {}
    for key, names in sorted(halves.items()):
        if len(names) < 2:
            (half,) = names
            other = "B" if half == "A" else "A"
            raise InvalidAdapterError(
                f"tensor {names[half]} has no partner: lora_{other} of {module_names[key]} is "
                "missing"
            )
        weights[key] = _check_module(key, module_names[key], names, tensors, config, geometry)
    return weights


def _parse_name(name: str, geometry: AdapterGeometry) -> re.Match[str]:
    """Match the name of a tensor of a module that the base model has."""
    match = _TENSOR_NAME.fullmatch(name)
    if match is None or match["path"] not in geometry.modules:
        supported = ", ".join(geometry.module_names)
        if "embed" in name or "lm_head" in name:
            raise InvalidAdapterError(
                f"tensor {name} is for the embeddings or the output head, which adapters cannot "
                f"change here; supported modules are {supported}"
            )
        raise InvalidAdapterError(
            f"tensor {name} is not LoRA A or B of a supported module: {supported}"
        )
    layer = int(match["layer"])
    if layer >= geometry.num_layers:
        raise InvalidAdapterError(
            f"tensor {name} is for layer {layer}; the base model has layers 0 to "
            f"{geometry.num_layers - 1}"
        )
    if geometry.module_dims[layer][geometry.modules.index(match["path"])] is None:
        raise InvalidAdapterError(
            f"tensor {name} is for {match['path']}, which the base model's layer {layer} lacks"
        )
    return match


def _check_module(
    key: ModuleKey,
    module_name: str,
    names: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor],
    config: PeftLoraConfig,
    geometry: AdapterGeometry,
) -> LoraWeights:
    """Check dtype, shape and values of one module's A and B."""
    layer, module = key
    dims = geometry.module_dims[layer][module]
    assert dims is not None, "refused with the tensor's name"
    in_features, out_features = dims
    rank = config.rank_of(module_name)
    for matrix, expected in (("A", (rank, in_features)), ("B", (out_features, rank))):
        name = names[matrix]
        tensor = tensors[name]
        if tensor.shape != expected:
            raise InvalidAdapterError(
                f"tensor {name} has shape {list(tensor.shape)}, expected {list(expected)}: rank "
                f"{rank} by {CONFIG_FILE}, {in_features} in and {out_features} out features of "
                f"the base model's {geometry.module_names[module]}"
            )
        if tensor.dtype not in _DTYPES:
            raise InvalidAdapterError(f"tensor {name} has dtype {tensor.dtype}, not a float type")
        if not _is_finite(tensor):
            raise InvalidAdapterError(f"tensor {name} holds NaN or infinity")
        if tensor.dtype != geometry.dtype and not _is_finite(tensor.to(geometry.dtype)):
            raise InvalidAdapterError(
                f"tensor {name} holds values too large for the server's {geometry.dtype}"
            )
    scaling = config.scaling_of(module_name)
    if abs(scaling) > torch.finfo(torch.float32).max:
        raise InvalidAdapterError(
            f"lora_alpha in {CONFIG_FILE} scales {module_name} by {scaling}, too large for float32"
        )
    return LoraWeights(tensors[names["A"]], tensors[names["B"]], scaling)


def _is_finite(tensor: torch.Tensor) -> bool:
    # A NaN is both least and largest. Ten times as fast as asking of every element.
    least, largest = torch.aminmax(tensor)
    return math.isfinite(least.item()) and math.isfinite(largest.item())
