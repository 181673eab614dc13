"""Sizes that a step is padded to, so that few kernels are compiled and few graphs captured."""

from collections.abc import Sequence
from dataclasses import dataclass

from slora_core.config import EngineConfig
from slora_core.models.config import O_PROJ, QKV, ModelConfig

# Ranks that LoRA kernels are launched for; a batch takes the smallest that holds its largest.
RANK_BUCKETS = (16, 32, 64, 128, 256)

# Rows of a step with prompts up to which it has a graph: 1,024 rows are computed in about the time
# that launching their kernels one by one takes.
PROMPT_GRAPH_ROWS = 1024
# Prompts that such a graph has room for.
MAX_GRAPH_PROMPTS = 32


@dataclass(frozen=True)
class LoraShape:
    """What the LoRA kernels of a step are launched for."""

    # At least the largest rank of any adapter in the step.
    max_rank: int
    # At least the modules, by index in the model's, of any adapter in the step.
    modules: frozenset[int]

    def graph_bucket(self, module_buckets: Sequence[frozenset[int]]) -> "LoraShape":
        """The smallest shape with a graph that holds this one."""
        modules = next(bucket for bucket in module_buckets if self.modules <= bucket)
        return LoraShape(bucket_of(self.max_rank, RANK_BUCKETS), modules)


def module_buckets(model: ModelConfig) -> tuple[frozenset[int], ...]:
    """Sets of modules that have graphs: those of attention, which most adapters target, and all."""
    projections = model.names.projections
    attention = [i for i, p in enumerate(projections) if p.linear in (QKV, O_PROJ)]
    return frozenset(attention), frozenset(range(len(projections)))


def max_graph_rows(engine: EngineConfig) -> int:
    """Rows of the largest step that has a graph: all running requests, or a few prompts."""
    return max(engine.max_running_requests, min(PROMPT_GRAPH_ROWS, engine.max_batched_tokens))


def batch_buckets(max_rows: int) -> list[int]:
    """Numbers of decodes that have a graph, ascending: dense where a row of padding costs most."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32)]
    sizes += range(256, max_rows, 64)
    return [size for size in sizes if size < max_rows] + [max_rows]


def prompt_batch_buckets(max_rows: int) -> list[int]:
    """Rows of steps with prompts that have a graph, ascending."""
    sizes = [16, 32, *range(64, 512, 64), *range(512, max_rows, 128)]
    return [size for size in sizes if size < max_rows] + [max_rows]


def warm_up_sizes(max_tokens: int) -> list[int]:
    """Lengths of a prompt that together are launched in all the ways that prompts are."""
    sizes = [16, *(size << i for i in range(max_tokens.bit_length()) for size in (32, 48))]
    return [size for size in sizes if size < max_tokens] + [max_tokens]


def bucket_of(value: int, buckets: Sequence[int]) -> int:
    """The smallest of the ascending buckets that holds `value`; the last one holds all."""
    return next(bucket for bucket in buckets if value <= bucket)
