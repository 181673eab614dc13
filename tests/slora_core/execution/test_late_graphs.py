"""Graphs that steps lacked: few of them are captured, once each, with nothing else to do."""

import logging
from pathlib import Path

import pytest

from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.execution.late_graphs import LateGraphs
from slora_core.execution.step_inputs import StepShape
from slora_core.requests import Request, SamplingParams
from tests.factories import make_model

SHAPES = [StepShape(rows, rows, 0, None, is_padded=True) for rows in range(1, 6)]


def test_each_is_wanted_once_in_order_and_not_too_many() -> None:
    late = LateGraphs(max_graphs=3)
    for shape in (*SHAPES, *SHAPES):
        late.want(shape)
    assert [late.next() for _ in range(len(late))] == SHAPES[:3]
    # Neither one that was captured, or could not be, nor more.
    for shape in SHAPES:
        late.want(shape)
    assert len(late) == 0


class FakeGraphs:
    """Has graphs of the shapes that were captured, and fails at those it is told to."""

    def __init__(self) -> None:
        self.captured: list[StepShape] = []
        self.fails = False

    def __contains__(self, shape: StepShape) -> bool:
        return shape in self.captured

    def __len__(self) -> int:
        return len(self.captured)

    def capture(self, shape: StepShape, fields: object, forward: object) -> None:
        if self.fails:
            raise RuntimeError("out of memory")
        self.captured.append(shape)


@pytest.fixture
def engine(tmp_path: Path, one_thread: None) -> Engine:
    """On the CPU, its steps padded as those of an engine with graphs are."""
    engine = Engine.from_pretrained(
        make_model(tmp_path / "model", "llama", seed=4), EngineConfig(num_pool_tokens=1024)
    )
    engine.builder.shapes.has_graphs = True
    engine.runner._graphs = FakeGraphs()  # type: ignore[assignment]
    return engine


def _generate(engine: Engine) -> list[int]:
    sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    [tokens] = engine.generate([Request([5, 17, 99], sampling)])
    return tokens


def test_a_step_without_its_graph_runs_and_is_captured_later(
    engine: Engine, tmp_path: Path
) -> None:
    unpadded = Engine.from_pretrained(tmp_path / "model", EngineConfig(num_pool_tokens=1024))
    assert _generate(engine) == _generate(unpadded)
    graphs = engine.runner._graphs
    assert isinstance(graphs, FakeGraphs) and graphs.captured == []
    # Of the prompt and of a decode.
    assert len(engine.runner.late_graphs) == 2
    while engine.has_late_graphs:
        engine.capture_late_graph()
    assert [shape.num_rows for shape in graphs.captured] == [16, 1]


def test_a_capture_that_fails_is_told_and_the_last(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = engine.runner._graphs
    assert isinstance(graphs, FakeGraphs)
    graphs.fails = True
    tokens = _generate(engine)
    with caplog.at_level(logging.WARNING):
        engine.capture_late_graph()
    assert "no graph was captured of StepShape" in caplog.text
    assert not engine.has_late_graphs
    assert _generate(engine) == tokens
    assert not engine.has_late_graphs
