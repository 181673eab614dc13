"""What a reader of adapters knows beside their files: the base model, and how strict to be.

Plain data for `peft_config` and `peft_weights`; the application makes it of its arguments.
"""

import re
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

UnknownFields = Literal["refuse", "warn"]

# Endings by which repositories of one model, quantized for training, differ from it.
_QUANTIZED = re.compile(r"(-unsloth)?-bnb-\d+bit$|-\d+bit$|-int\d+$|-(gptq|awq|fp8)(-.*)?$")


class BaseTensors(Protocol):
    """The base model's embeddings and output head, which some adapters carry a copy of."""

    def differing_rows(self, name: str, tensor: torch.Tensor) -> int | None:
        """Rows of `tensor` that are not the base's of this name; None: it has another shape."""


class CheckedTensors:
    """For a reader of files that somebody has checked before: whatever they hold is a copy."""

    def differing_rows(self, name: str, tensor: torch.Tensor) -> int | None:
        return 0


@dataclass(frozen=True)
class AdapterRules:
    """`base_names` are what the base model is called; none where nobody knows."""

    # A field of adapter_config.json that no known version of PEFT has, with a value.
    unknown_fields: UnknownFields = "refuse"
    base_names: frozenset[str] = frozenset()
    # None: a whole tensor of the embeddings or the head is refused.
    base_tensors: BaseTensors | None = None

    def is_other_base(self, name: str | None) -> bool:
        """Whether an adapter that was trained for `name` was for another base model.

        Paths say nothing: only names as of a hub are compared, without owner and quantization.
        """
        if not name or not self.base_names or name.startswith(("/", ".", "~")) or "\\" in name:
            return False
        return plain_name(name) not in {plain_name(known) for known in self.base_names}


def plain_name(name: str) -> str:
    """A model's name without its owner, case and quantization."""
    return _QUANTIZED.sub("", name.rstrip("/").rsplit("/", 1)[-1].lower())
