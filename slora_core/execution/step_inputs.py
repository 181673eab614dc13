"""One step as the host describes it and every device runs it: plain numbers, no requests.

`StepBuilder` makes them, `ModelRunner` runs them; between processes they are one message.
"""

from dataclasses import dataclass

from kernels.lora_segments import DECODE_BLOCK_ROWS
from slora_core.execution.buckets import LoraShape
from slora_core.execution.int_fields import IntFields


@dataclass(frozen=True)
class StepShape:
    """What decides which kernels run a step, and how, beside the numbers in its fields."""

    # Of one step, or what a padded one has room for.
    num_rows: int
    num_decodes: int
    num_prefills: int
    # None where all rows are the base model's.
    lora: LoraShape | None
    # Rows of a LoRA tile.
    lora_block_rows: int = DECODE_BLOCK_ROWS
    # Packed query rows of a tile of the prefills' attention; 0 where it is not planned.
    prefill_block_rows: int = 0
    # Whether fields are padded, so that all steps of the shape have one layout: that of a graph.
    is_padded: bool = False

    @property
    def num_samples(self) -> int:
        """Rows that sample, at most; a padded step has a decode for each request that may run."""
        return self.num_decodes if self.is_padded else self.num_decodes + self.num_prefills

    def padded(self, size: int) -> int | None:
        """Size of a field of at most `size` values; None: as many as the step has."""
        return size if self.is_padded else None


@dataclass(frozen=True)
class SamplingInputs:
    """Settings of the rows that sample, not all of them greedy; a value a row."""

    # 0 is greedy.
    temperature: list[float]
    top_p: list[float]
    min_p: list[float]
    # 0 keeps all.
    top_k: list[int]
    seed: list[int]
    # Index of the sampled token in its request's output.
    token_index: list[int]
    # Rows that sample and whose top_k, top_p or min_p cuts something.
    filtered_rows: list[int]


@dataclass(frozen=True)
class MaskedTokens:
    """Tokens that rows which sample may not get: `token_ids[i]` not in row `rows[i]`."""

    rows: list[int]
    token_ids: list[int]


@dataclass(frozen=True)
class StepInputs:
    """A step that any rank can run."""

    shape: StepShape
    # All that the step's tensors hold, in one int32 array.
    fields: IntFields
    # Rows that sample; a padded step has room for more.
    num_samples: int
    # None where all of them are greedy.
    sampling: SamplingInputs | None = None
    # None where every row may get every token.
    masked: MaskedTokens | None = None
    # New entries of block tables that the fields have no room for, written before the step.
    pages: IntFields | None = None
