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
from slora_core.errors import InvalidAdapterError
from slora_core.models.weights import checkpoint_files

# Names of the tensors in the base model's files; a head that is tied to the embeddings has none.
_BASE_NAMES = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
# Rows compared at one time.
_BLOCK_ROWS = 8192


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
    warnings = []
    for name, whole in names.items():
        if rules.base_tensors is None:
            raise InvalidAdapterError(
                f"tensor {name} is the whole {whole.tensor}, which adapters cannot change here"
            )
        tensor = tensors[name]
        num_differing = rules.base_tensors.differing_rows(whole.tensor, tensor)
        if num_differing is None:
            raise InvalidAdapterError(
                f"tensor {name} has shape {list(tensor.shape)}, which is not the base model's: a "
                "vocabulary that training has resized is not supported"
            )
        if num_differing:
            raise InvalidAdapterError(
                f"tensor {name} differs from the base model's in {num_differing} of "
                f"{len(tensor)} rows: trained embeddings and output heads are not supported"
            )
        warnings.append(f"{name} is a copy of the base model's and was ignored")
    saved = {whole.tensor for whole in names.values()}
    missing = [name for name in config.modules_to_save if name.rsplit(".", 1)[-1] not in saved]
    if missing:
        warnings.append(
            f"modules_to_save in {CONFIG_FILE} names {', '.join(missing)[:80]}, of which the file "
            "has no tensor"
        )
    return warnings


class BaseModelTensors:
    """`BaseTensors` of a model directory; tensors are read when they are first asked for.

    One is compared by its hash, which is kept, so that a thousand copies cost one reading.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self._model_dir = Path(model_dir)
        self._lock = threading.Lock()
        self._digests: dict[tuple[str, torch.dtype], bytes] = {}

    def differing_rows(self, name: str, tensor: torch.Tensor) -> int | None:
        with self._lock:
            known = self._digests.get((name, tensor.dtype))
        if known is not None and known == _digest(tensor):
            return 0
        base = self._read(name)
        if base is None or base.shape != tensor.shape:
            return None
        base = base.to(tensor.dtype)
        with self._lock:
            self._digests[name, tensor.dtype] = _digest(base)
        return sum(
            int((rows != base[start : start + _BLOCK_ROWS]).any(dim=1).sum())
            for start, rows in zip(
                range(0, len(tensor), _BLOCK_ROWS), tensor.split(_BLOCK_ROWS), strict=True
            )
        )

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


def _digest(tensor: torch.Tensor) -> bytes:
    tensor = tensor.contiguous()
    # Not by numpy, which a server need not have.
    data = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return hashlib.sha256(data).digest()
