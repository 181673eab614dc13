"""Whole embeddings and output heads in an adapter's file, which training may save beside LoRA.

A copy of the base model's changes nothing and is ignored; trained ones cannot be served beside a
base model that other adapters share.
"""

import ctypes
import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from slora_core.adapters.adapter_rules import AdapterRules
from slora_core.adapters.peft_config import CONFIG_FILE, PeftLoraConfig
from slora_core.adapters.tensor_names import WholeTensorName
from slora_core.adapters.tensor_types import check_dtype
from slora_core.errors import InvalidAdapterError
from slora_core.models.weights import checkpoint_files
from slora_core.quoting import plain, quoted

# Names of the tensors in the base model's files; a head that is tied to the embeddings has none.
_BASE_NAMES = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
# Rows compared at one time.
_BLOCK_ROWS = 8192
# What training may have loaded the base model in before it saved a copy in another type.
_LOADED_IN = (torch.bfloat16, torch.float16)
# Copies of one tensor in one type that differ in their bytes: by way of a type, in signs of zeros.
_MAX_DIGESTS = 16


def check_whole_tensors(
    names: Mapping[str, WholeTensorName],
    tensors: Mapping[str, torch.Tensor],
    config: PeftLoraConfig,
    rules: AdapterRules,
) -> list[str]:
    """Warnings of the copies that are ignored, and of what the config names and the file lacks.

    Raises:
        InvalidAdapterError: a tensor that is no copy, with how many rows differ.
    """
    # One name of each, however many the file has.
    copies: dict[str, str] = {}
    for name, whole in names.items():
        shown, tensor = plain(name), tensors[name]
        if rules.base_tensors is None:
            raise InvalidAdapterError(
                f"tensor {shown} is the whole {whole.tensor}, which adapters cannot change here"
            )
        check_dtype(name, tensor)
        num_differing = rules.base_tensors.differing_rows(whole.tensor, tensor)
        if num_differing is None:
            raise InvalidAdapterError(
                f"tensor {shown} has shape {quoted(list(tensor.shape))}, which is not the base "
                "model's: a vocabulary that training has resized is not supported"
            )
        if num_differing:
            raise InvalidAdapterError(
                f"tensor {shown} differs from the base model's in {num_differing} of "
                f"{len(tensor)} rows: trained embeddings and output heads are not supported"
            )
        copies.setdefault(whole.tensor, shown)
    warnings = [
        f"{shown} is a copy of the base model's and was ignored" for shown in copies.values()
    ]
    missing = [name for name in config.modules_to_save if name.rsplit(".", 1)[-1] not in copies]
    if missing:
        named = plain(", ".join(missing))
        warnings.append(
            f"modules_to_save in {CONFIG_FILE} names {named}, of which the file has no tensor"
        )
    return warnings


class BaseModelTensors:
    """`BaseTensors` of a model directory; tensors are read when they are first asked for.

    A copy is what training saves of a tensor that it left alone: the base model's in its own type
    or another, also by way of the 16 bits that the model was loaded in. Its hash is kept, so that
    a thousand copies cost one reading.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self._model_dir = Path(model_dir)
        self._lock = threading.Lock()
        # Of copies, by the tensor's name.
        self._digests: dict[str, set[bytes]] = {}

    def differing_rows(self, name: str, tensor: torch.Tensor) -> int | None:
        digest = _digest(tensor)
        with self._lock:
            if digest in self._digests.get(name, ()):
                return 0
        base = self._read(name)
        if base is None or base.shape != tensor.shape:
            return None
        fewest = len(tensor)
        for way in (tensor.dtype, *_LOADED_IN):
            fewest = min(fewest, _num_differing(base, tensor, way))
            if fewest == 0:
                self._keep(name, digest)
                break
        return fewest

    def _keep(self, name: str, digest: bytes) -> None:
        with self._lock:
            digests = self._digests.setdefault(name, set())
            if len(digests) < _MAX_DIGESTS:
                digests.add(digest)

    def _read(self, name: str) -> torch.Tensor | None:
        """A tensor of the base model; that of a tied head is the embeddings."""
        from safetensors import safe_open

        wanted = [_BASE_NAMES[name], _BASE_NAMES["embed_tokens"]]
        for wanted_name in wanted:
            for path in checkpoint_files(self._model_dir):
                with safe_open(path, framework="pt") as file:
                    if wanted_name in file.keys():  # noqa: SIM118
                        return file.get_tensor(wanted_name)
        return None


def _num_differing(base: torch.Tensor, tensor: torch.Tensor, way: torch.dtype) -> int:
    """Rows of `tensor` that are not those of `base` once that was of type `way`."""
    blocks = zip(base.split(_BLOCK_ROWS), tensor.split(_BLOCK_ROWS), strict=True)
    return sum(
        int((rows != base_rows.to(way).to(rows.dtype)).any(dim=1).sum())
        for base_rows, rows in blocks
    )


def _digest(tensor: torch.Tensor) -> bytes:
    """Of type, shape and elements."""
    tensor = tensor.contiguous()
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    # Not by numpy, which a server need not have.
    digest.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return digest.digest()
