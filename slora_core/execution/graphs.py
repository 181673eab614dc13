"""CUDA graphs of small steps: captured once for each padded shape, then replayed.

Padding rows of a step have no context, no place in the KV and no adapter. Knows no requests: it
is given a step's fields.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from slora_core.execution.int_fields import IntFields
from slora_core.execution.step_inputs import StepShape


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    # int32, what the graph reads: filled before each replay.
    inputs: torch.Tensor


class StepGraphs:
    """Graphs by padded shape; they share one memory pool, so their outputs must live outside it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[StepShape, _Graph] = {}

    def __contains__(self, shape: StepShape) -> bool:
        return shape in self._graphs

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(
        self,
        shape: StepShape,
        fields: IntFields,
        forward: Callable[[torch.Tensor, int | None], None],
    ) -> None:
        """Record the graph of a shape.

        Args:
            fields: a step of the shape, whose layout all of them have. Its KV is written more than
                once, with the same values.
            forward: computes a step from a buffer of that layout, without synchronising, by so
                many of the first layers or, with None, by all.
        """
        inputs = torch.empty(len(fields), dtype=torch.int32, device=self._device)
        fields.copy_to(inputs)
        # Sets up libraries, and compiles kernels that the start did not, which cannot be done while
        # capturing; the first layers have them all.
        forward(inputs, 1)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may register memory meanwhile.
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        stream = torch.cuda.current_stream(self._device)
        try:
            with _without_garbage_collection(), capture:
                forward(inputs, None)
        finally:
            # Where the capture itself cannot be ended, torch leaves its own stream the current one.
            torch.cuda.set_stream(stream)
        self._graphs[shape] = _Graph(graph, inputs)

    def replay(self, shape: StepShape, fields: IntFields) -> torch.Tensor:
        """Start a step; returns the device copy of its fields, overwritten by the next replay."""
        entry = self._graphs[shape]
        fields.copy_to(entry.inputs)
        entry.graph.replay()
        return entry.inputs


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Nothing may be destroyed during a capture that the driver must free, as other graphs are."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
