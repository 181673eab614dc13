"""Graphs that the start did not capture and steps would have used: which, in what order.

A capture stalls every stream, so a step without a graph runs kernel by kernel, and its graph is
captured when the engine has nothing else to do. Plain choice; it captures nothing itself.
"""

from collections import deque

from slora_core.execution.step_inputs import StepShape

# A graph's own memory is beside what `memory_utilization` counts, so there are not many.
MAX_LATE_GRAPHS = 64


class LateGraphs:
    """Each shape is given out once."""

    def __init__(self, max_graphs: int = MAX_LATE_GRAPHS) -> None:
        self._max_graphs = max_graphs
        self._known: set[StepShape] = set()
        self._waiting: deque[StepShape] = deque()

    def __len__(self) -> int:
        """Shapes that wait to be captured."""
        return len(self._waiting)

    def want(self, shape: StepShape) -> None:
        """A step ran that would have had this graph."""
        if shape not in self._known and len(self._known) < self._max_graphs:
            self._known.add(shape)
            self._waiting.append(shape)

    def stop(self) -> None:
        """Give out no more: a capture failed, and left less memory or worse to the next ones."""
        self._max_graphs = 0
        self._waiting.clear()

    def next(self) -> StepShape:
        """The shape to capture, the first that was wanted."""
        return self._waiting.popleft()
