"""Seconds of stages add up, in order, also where a stage fails."""

import pytest

from slora_core.stage_timer import StageTimer


def test_stages_add_up_in_order_whatever_they_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 10.0, 12.5, 20.0, 24.0])
    monkeypatch.setattr("slora_core.stage_timer.time.perf_counter", lambda: next(now))
    stages = StageTimer()
    with stages.measure("first"):
        pass
    with pytest.raises(ValueError), stages.measure("second"):
        raise ValueError
    with stages.measure("first"):
        pass
    assert list(stages.seconds.items()) == [("first", 5.0), ("second", 2.5)]
