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
from slora_core.adapters.base_names import is_other_base
from slora_core.adapters.page_layout import (
    AdapterGeometry,
    AdapterLayout,
    LoraWeights,
    ModuleKey,
    PackedAdapter,
    pack_adapter,
    plan_layout,
)
from slora_core.adapters.peft_config import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    PeftLoraConfig,
    parse_peft_config,
)
from slora_core.adapters.tensor_names import LoraTensorName, sort_names
from slora_core.adapters.tensor_types import SUPPORTED, check_dtype
from slora_core.adapters.whole_tensors import check_whole_tensors
from slora_core.errors import AdapterUnreadableError, InvalidAdapterError
from slora_core.quoting import plain, quoted

WEIGHTS_FILE = "adapter_model.safetensors"

# Names, types and shapes of tensors; PEFT's longest have 0.3 MB. One of this size has up to 70,000
# tensors, which take half a second with the GIL held.
MAX_HEADER_BYTES = 1 << 22

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
    config_bytes = _read_file(directory, CONFIG_FILE, MAX_CONFIG_BYTES)
    config = parse_peft_config(config_bytes, rules.unknown_fields)
    weights_bytes = _read_file(directory, WEIGHTS_FILE)
    # The config's length keeps the border between the files part of what is hashed.
    digest = hashlib.sha256(len(config_bytes).to_bytes(8, "little"))
    digest.update(config_bytes)
    digest.update(weights_bytes)
    read_s = time.perf_counter() - started_at
    tensors = _parse_safetensors(weights_bytes)
    lora_names, whole_names = sort_names(tensors, geometry)
    if not lora_names:
        raise InvalidAdapterError(
            f"{WEIGHTS_FILE} holds no LoRA tensors: the adapter matches no module of the base model"
        )
    warnings = [
        *config.warnings,
        *check_whole_tensors(whole_names, tensors, config, rules),
    ]
    if config.base_model is not None and is_other_base(config.base_model, rules.base_names):
        warnings.append(
            f"it was trained for {plain(config.base_model)}; the base model here is "
            f"{rules.base_names[0]}"
        )
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


def _read_file(directory: Path, name: str, max_bytes: int | None = None) -> bytes:
    path = directory / name
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InvalidAdapterError(f"{path} is not a regular file")
            if max_bytes is not None and status.st_size > max_bytes:
                raise InvalidAdapterError(
                    f"{path} has {status.st_size} bytes; at most {max_bytes} are allowed"
                )
            return file.read()
    except FileNotFoundError:
        raise _missing_file(directory, name) from None
    except OSError as error:
        what = f"cannot read {path}: {error.strerror}"
        if error.errno in _LASTING_ERRORS:
            raise InvalidAdapterError(what) from None
        raise AdapterUnreadableError(f"{what}; try again") from None
    except MemoryError:
        raise InvalidAdapterError(f"{path} is larger than this machine's memory") from None


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
            f"{directory} has {plain(pickles[0])} and no {WEIGHTS_FILE}: pickled weights are never "
            "loaded, since they can run code; save the adapter with safe_serialization=True"
        )
    return InvalidAdapterError(f"{directory} has no {name}")


def _parse_safetensors(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise InvalidAdapterError(
            f"{WEIGHTS_FILE} is damaged or truncated, or no adapter's: by its first bytes it has a "
            f"header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed"
        )
    try:
        return load(data)
    except KeyError as error:
        # Of a dtype that the library knows and torch has not.
        raise InvalidAdapterError(
            f"{WEIGHTS_FILE} holds tensors of dtype {plain(str(error))}, which are not supported; "
            f"supported are {SUPPORTED}"
        ) from None
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise InvalidAdapterError(
            f"{WEIGHTS_FILE} is damaged or truncated: {plain(str(error))}"
        ) from None


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
    pairs = dict(sorted(halves.items()))
    for pair in pairs.values():
        if len(pair) < 2:
            ((half, name),) = pair.items()
            other = "B" if half == "A" else "A"
            raise InvalidAdapterError(
                f"tensor {plain(name)} has no partner: lora_{other} of {names[name].module_name} "
                "is missing"
            )
    # As PEFT matched its patterns; where it saw no wrapper yet, as in the base model.
    matched = [
        (names[pair["A"]].trained_name, names[pair["A"]].module_name) for pair in pairs.values()
    ]
    ranks = config.ranks(matched)
    scalings = config.scalings(matched, ranks)
    weights = {}
    for (key, pair), rank, scaling in zip(pairs.items(), ranks, scalings, strict=True):
        _check_module(names[pair["A"]], pair, tensors, rank, geometry)
        if abs(scaling) > torch.finfo(torch.float32).max:
            raise InvalidAdapterError(
                f"lora_alpha in {CONFIG_FILE} scales {names[pair['A']].module_name} by {scaling}, "
                "too large for float32"
            )
        weights[key] = LoraWeights(tensors[pair["A"]], tensors[pair["B"]], scaling)
    return weights


def _check_module(
    parsed: LoraTensorName,
    names: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor],
    rank: int,
    geometry: AdapterGeometry,
) -> None:
    """Check dtype, shape and values of one module's A and B."""
    layer, module = parsed.layer, parsed.module
    dims = geometry.module_dims[layer][module]
    assert dims is not None, "refused with the tensor's name"
    in_features, out_features = dims
    for matrix, expected in (("A", (rank, in_features)), ("B", (out_features, rank))):
        name = names[matrix]
        tensor = tensors[name]
        if tensor.shape != expected:
            raise InvalidAdapterError(
                f"tensor {plain(name)} has shape {quoted(list(tensor.shape))}, expected "
                f"{list(expected)}: rank {rank} by {CONFIG_FILE}, {in_features} in and "
                f"{out_features} out features of the base model's {geometry.module_names[module]}"
            )
        check_dtype(name, tensor)
        if not _is_finite(tensor):
            raise InvalidAdapterError(f"tensor {plain(name)} holds NaN or infinity")
        if tensor.dtype != geometry.dtype and not _is_finite(tensor.to(geometry.dtype)):
            raise InvalidAdapterError(
                f"tensor {plain(name)} holds values too large for the server's {geometry.dtype}"
            )


def _is_finite(tensor: torch.Tensor) -> bool:
    # A NaN is both least and largest. Ten times as fast as asking of every element.
    least, largest = torch.aminmax(tensor)
    return math.isfinite(least.item()) and math.isfinite(largest.item())
