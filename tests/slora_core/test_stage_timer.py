"""Seconds of stages add up, in order, also where a stage fails."""

import time

import pytest

from slora_core.stage_timer import StageTimer


def test_stages_add_up_in_order_whatever_they_raise() -> None:
    stages = StageTimer()
    with stages.measure("first"):
        time.sleep(0.01)
    with pytest.raises(ValueError), stages.measure("second"):
        raise ValueError
    before = stages.seconds["first"]
    with stages.measure("first"):
        time.sleep(0.01)
    assert list(stages.seconds) == ["first", "second"]
    assert 0.01 <= before <= stages.seconds["first"] - 0.01
    assert 0 <= stages.seconds["second"] < 0.01
