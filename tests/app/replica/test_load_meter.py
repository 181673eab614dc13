from contextlib import ExitStack
from dataclasses import fields

import pytest

from app.replica.load_meter import LoadMeter
from app.routing.autoscaling import QUEUED_TOKENS, RUNNING_TOKENS, USED_PAGE_SHARE
from slora_core.requests import Delta, FinishReason, LoadFigures, Request, SamplingParams
from slora_core.stats import EngineStats
from tests.app.fakes import make_record

RECORD = make_record("a")
PAGE_TOKENS = 16


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def meter(clock):
    return LoadMeter("replica-1", PAGE_TOKENS, clock)


def request(num_tokens=40, adapter_id=None):
    return Request(list(range(num_tokens)), SamplingParams(), adapter_id)


def engine_stats(**pages):
    return EngineStats(**{**{field.name: 0 for field in fields(EngineStats)}, **pages})


def test_the_first_delta_and_the_last_tell_the_load(meter):
    with meter.counted(request(40), None) as first, meter.counted(request(70), None) as second:
        assert meter.figures() == LoadFigures("replica-1", 2, 2, 110, 1.0)
        told = first(Delta("r", [1]))
        assert told == Delta("r", [1], load=LoadFigures("replica-1", 2, 1, 70, 1.0))
        assert first(Delta("r", [2])).load is None
        assert first(Delta("r", [3], FinishReason.LENGTH)).load == told.load
        assert second(Delta("r", [1], FinishReason.STOP)).load.num_waiting == 0
    assert meter.figures() == LoadFigures("replica-1", 0, 0, 0, 1.0)


def test_a_request_that_fails_before_its_first_token_waits_no_more(meter):
    with pytest.raises(RuntimeError), meter.counted(request(), RECORD):
        raise RuntimeError
    assert meter.figures() == LoadFigures("replica-1", 0, 0, 0, 1.0)


def test_pages_are_the_engines(meter):
    assert not meter.needs_pages
    with meter.counted(request(), None):
        assert meter.needs_pages
        meter.saw_pages(
            engine_stats(num_pages=100, num_free_pages=5, num_idle_prefix_pages=15, num_kv_pages=60)
        )
        assert meter.figures().free_page_share == 0.2
        assert meter.autoscaling_stats() == {
            QUEUED_TOKENS: 40.0,
            RUNNING_TOKENS: 960.0,
            USED_PAGE_SHARE: 0.6,
        }
    # Until the last of them are seen to be free.
    assert meter.needs_pages
    meter.saw_pages(engine_stats(num_pages=100, num_free_pages=100))
    assert not meter.needs_pages


def test_small_changes_are_not_told(meter):
    told = []
    with ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(meter.counted(request(), None))
            told.append(meter.coarse_num_requests)
    assert sorted(set(told)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert meter.coarse_num_requests == 0


def test_adapters_that_were_asked_for_are_hot(meter, clock):
    others = [make_record(name) for name in "bc"]
    for record in (RECORD, others[0], RECORD):
        with meter.counted(request(40, record.adapter_id), record):
            pass
    assert meter.heat.hottest() == [(2.0, RECORD), (1.0, others[0])]
