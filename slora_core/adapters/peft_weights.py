"""Reading of an adapter directory that PEFT saved: checks, identity, weights.

Tensor names and shapes are the truth of which modules an adapter has. It packs nothing (see
`page_layout`) and never unpickles. The registry inspects with it, the host store reads with it.
Files are read whole before they are parsed, not mapped: one that somebody truncates meanwhile
then gives an error here instead of a SIGBUS, and the hash is of the very bytes that are used.
"""

import errno
import hashlib
import math
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from slora_core.adapters.adapter_rules import AdapterRules
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
from slora_core.adapters.tensor_names import LoraTensorName, WholeTensorName, parse_tensor_name
from slora_core.adapters.whole_tensors import check_whole_tensors
from slora_core.errors import AdapterUnreadableError, InvalidAdapterError

WEIGHTS_FILE = "adapter_model.safetensors"

# What PEFT and others call the same weights in pickled form.
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# Of reading a file: what trying again does not change. A disk or a network may be back later.
_LASTING_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENXIO,
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
    # Seconds that reading and hashing them took.
    read_s: float = 0.0

    @property
    def max_rank(self) -> int:
        return self.layout.max_rank

    @property
    def num_pages(self) -> int:
        return self.layout.num_pages


def inspect_peft_adapter(
    directory: str | Path, geometry: AdapterGeometry, rules: AdapterRules | None = None
) -> AdapterSummary:
    """Check an adapter directory against the base model and describe it.

    Raises:
        InvalidAdapterError: as `read_peft_adapter`.
    """
    return read_peft_adapter(directory, geometry, rules)[0]


def load_packed_adapter(directory: str | Path, geometry: AdapterGeometry) -> PackedAdapter:
    """An adapter directory in page order in this process's own memory.

    Raises:
        InvalidAdapterError: as `read_peft_adapter`.
    """
    summary, weights = read_peft_adapter(directory, geometry)
    pages = pack_adapter(geometry, summary.layout, weights)
    return PackedAdapter(summary.adapter_id, summary.layout, pages)


def read_peft_adapter(
    directory: str | Path, geometry: AdapterGeometry, rules: AdapterRules | None = None
) -> tuple[AdapterSummary, dict[ModuleKey, LoraWeights]]:
    """Summary and weights of an adapter directory, both of one reading of its files.

    Args:
        rules: None are the strictest.

    Raises:
        InvalidAdapterError: a file is missing, damaged or pickled; a config field is unsupported
            (named); a tensor (named) is of no supported module, lacks its partner, has a shape
            that the base model or the configured rank does not allow, or holds NaN or infinity;
            or it is one of the embeddings or the head, and not a copy of the base model's.
    """
    started_at = time.perf_counter()
    directory = Path(directory)
    rules = rules or AdapterRules()
    config_bytes = _read_file(directory, CONFIG_FILE)
    config = parse_peft_config(config_bytes, rules.unknown_fields)
    weights_bytes = _read_file(directory, WEIGHTS_FILE)
    # The config's length keeps the border between the files part of what is hashed.
    digest = hashlib.sha256(len(config_bytes).to_bytes(8, "little"))
    digest.update(config_bytes)
    digest.update(weights_bytes)
    read_s = time.perf_counter() - started_at
    tensors = _parse_safetensors(weights_bytes)
    lora_names, whole_names = _sort_names(tensors, geometry)
    warnings = [
        *config.warnings,
        *check_whole_tensors(whole_names, tensors, config, rules),
    ]
    if rules.is_other_base(config.base_model):
        known = ", ".join(sorted(rules.base_names))
        warnings.append(f"it was trained for {config.base_model}; the base model here is {known}")
    weights = _check_tensors(lora_names, tensors, config, geometry)

    ranks = {key: lora.rank for key, lora in weights.items()}
    scaling = {key: lora.scaling for key, lora in weights.items()}
    layout = plan_layout(geometry, ranks, scaling)
    summary = AdapterSummary(
        adapter_id=digest.hexdigest(),
        layout=layout,
        nbytes=layout.num_pages * geometry.page_bytes,
        warnings=tuple(warnings),
        read_s=read_s,
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
        what = f"cannot read {path}: {error.strerror}"
        if error.errno in _LASTING_ERRORS:
            raise InvalidAdapterError(what) from None
        raise AdapterUnreadableError(f"{what}; try again") from None


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


def _sort_names(
    tensors: Mapping[str, torch.Tensor], geometry: AdapterGeometry
) -> tuple[dict[str, LoraTensorName], dict[str, WholeTensorName]]:
    """What every tensor of a file is, by its name, none of them twice."""
    lora: dict[str, LoraTensorName] = {}
    whole: dict[str, WholeTensorName] = {}
    first_names: dict[ModuleKey, str] = {}
    for name in sorted(tensors):
        parsed = parse_tensor_name(name, geometry)
        if isinstance(parsed, WholeTensorName):
            whole[name] = parsed
            continue
        key = parsed.layer, parsed.module
        # Both `model.layers` (a causal model) and `layers` (its body alone) name a module.
        first = first_names.setdefault(key, name)
        known = lora.get(first, parsed)
        if known.trained_name != parsed.trained_name or known.adapter != parsed.adapter:
            raise InvalidAdapterError(
                f"tensor {name} is for a module that {first} names too: one of them is of another "
                "adapter, or of a copy"
            )
        lora[name] = parsed
    if not lora:
        raise InvalidAdapterError(
            f"{WEIGHTS_FILE} holds no LoRA tensors: the adapter matches no module of the base model"
        )
    return lora, whole


def _check_tensors(
    names: Mapping[str, LoraTensorName],
    tensors: Mapping[str, torch.Tensor],
    config: PeftLoraConfig,
    geometry: AdapterGeometry,
) -> dict[ModuleKey, LoraWeights]:
    """Pair A and B of each module."""
    halves: dict[ModuleKey, dict[str, str]] = {}
    for name, parsed in names.items():
        halves.setdefault((parsed.layer, parsed.module), {})[parsed.matrix] = name
    weights = {}
    for key, pair in sorted(halves.items()):
        if len(pair) < 2:
            ((half, name),) = pair.items()
            other = "B" if half == "A" else "A"
            raise InvalidAdapterError(
                f"tensor {name} has no partner: lora_{other} of {names[name].module_name} is "
                "missing"
            )
        weights[key] = _check_module(names[pair["A"]], pair, tensors, config, geometry)
    return weights


def _check_module(
    parsed: LoraTensorName,
    names: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor],
    config: PeftLoraConfig,
    geometry: AdapterGeometry,
) -> LoraWeights:
    """Check dtype, shape and values of one module's A and B."""
    layer, module = parsed.layer, parsed.module
    # As PEFT matched its patterns; where it saw no wrapper yet, as in the base model.
    matched = parsed.trained_name, parsed.module_name
    dims = geometry.module_dims[layer][module]
    assert dims is not None, "refused with the tensor's name"
    in_features, out_features = dims
    rank = config.rank_of(*matched)
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
            raise InvalidAdapterError(_wrong_dtype(name, tensor.dtype))
        if not _is_finite(tensor):
            raise InvalidAdapterError(f"tensor {name} holds NaN or infinity")
        if tensor.dtype != geometry.dtype and not _is_finite(tensor.to(geometry.dtype)):
            raise InvalidAdapterError(
                f"tensor {name} holds values too large for the server's {geometry.dtype}"
            )
    scaling = config.scaling_of(*matched)
    if abs(scaling) > torch.finfo(torch.float32).max:
        raise InvalidAdapterError(
            f"lora_alpha in {CONFIG_FILE} scales {parsed.module_name} by {scaling}, too large for "
            "float32"
        )
    return LoraWeights(tensors[names["A"]], tensors[names["B"]], scaling)


def _wrong_dtype(name: str, dtype: torch.dtype) -> str:
    found = str(dtype).removeprefix("torch.")
    supported = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
    kind = "fp8 adapters are not supported" if found.startswith("float8") else "not a float type"
    return f"tensor {name} has dtype {found}: {kind}; supported are {supported}"


def _is_finite(tensor: torch.Tensor) -> bool:
    # A NaN is both least and largest. Ten times as fast as asking of every element.
    least, largest = torch.aminmax(tensor)
    return math.isfinite(least.item()) and math.isfinite(largest.item())
