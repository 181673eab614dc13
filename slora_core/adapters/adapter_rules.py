"""What a reader of adapters knows beside their files: the base model, and how strict to be.

Plain data for `peft_config` and `peft_weights`; the application makes it of its arguments.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

UnknownFields = Literal["refuse", "warn"]


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
    """`base_names` are what the base model is called, first by its users; none: nobody knows."""

    # A field of adapter_config.json that no known version of PEFT has, with a value.
    unknown_fields: UnknownFields = "refuse"
    base_names: tuple[str, ...] = ()
    # None: a whole tensor of the embeddings or the head is refused.
    base_tensors: BaseTensors | None = None
