"""CUDA graphs of small steps: captured once for each batch size and shape of LoRA, then replayed.

A step replays the graph of the smallest batch size that holds it; its padding rows have no context,
no cache slot and no adapter. Knows no requests: it is given a step's fields.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from slora_core.execution.buckets import LoraShape, bucket_of
from slora_core.execution.int_fields import IntFields


@dataclass(frozen=True)
class GraphKey:
    """Rows of the batch, and what its LoRA kernels are launched for (None: base only)."""

    num_rows: int
    lora: LoraShape | None


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    # int32, what the graph reads: filled before each replay.
    inputs: torch.Tensor


class DecodeGraphs:
    """Graphs by key; they share one memory pool, so their outputs must live outside it.

    Args:
        batch_sizes: ascending sizes that have graphs.
    """

    def __init__(self, device: torch.device, batch_sizes: Sequence[int]) -> None:
        self._device = device
        self._batch_sizes = batch_sizes
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[GraphKey, _Graph] = {}

    def __contains__(self, key: GraphKey) -> bool:
        return key in self._graphs

    def __len__(self) -> int:
        return len(self._graphs)

    def batch_size(self, num_rows: int) -> int | None:
        """The size that a step of `num_rows` decodes is padded to; None where none holds it."""
        if num_rows > self._batch_sizes[-1]:
            return None
        return bucket_of(num_rows, self._batch_sizes)

    def capture(
        self, key: GraphKey, fields: IntFields, forward: Callable[[torch.Tensor], None]
    ) -> None:
        """Record the graph of a key.

        Args:
            fields: a step of padding rows alone, whose layout all steps of the key have.
            forward: computes a step from a buffer of that layout, without synchronising.
        """
        inputs = torch.empty(len(fields), dtype=torch.int32, device=self._device)
        fields.copy_to(inputs)
        # Compiles kernels and sets up libraries, which cannot be done while capturing.
        forward(inputs)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            forward(inputs)
        self._graphs[key] = _Graph(graph, inputs)

    def replay(self, key: GraphKey, fields: IntFields) -> torch.Tensor:
        """Start a step; returns the device copy of its fields, overwritten by the next replay."""
        entry = self._graphs[key]
        fields.copy_to(entry.inputs)
        entry.graph.replay()
        return entry.inputs
