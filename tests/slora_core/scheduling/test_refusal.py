"""Requests that are refused after they were queued: others go on, and the client is told once."""

import pytest

from slora_core.errors import InvalidRequestError, OverloadedError
from slora_core.requests import Delta, FinishReason
from tests.slora_core.scheduling.harness import Harness, make_config, make_request

both = pytest.mark.parametrize("inflight", [1, 2])
ERROR = OverloadedError("too late")


def _told(deltas: list[Delta]) -> list[Delta]:
    """Of requests that ended by an error."""
    return [delta for delta in deltas if delta.error is not None]


def _harness(num_pages: int, sizes: dict[str, int] | None = None, **config) -> Harness:
    return Harness(make_config(num_pages, **config), sizes or {})


@both
def test_a_waiting_request(inflight: int) -> None:
    harness = _harness(40, max_running=1, inflight=inflight)
    for name in ("running", "refused", "next"):
        harness.add(make_request(name, 5))
    harness.step()
    harness.refuse("refused", ERROR)
    assert harness.scheduler.num_waiting == 1
    assert _told(harness.step()) == [Delta("refused", [], None, ERROR)]
    assert _told(harness.step()) == []
    harness.run_to_end()
    assert harness.finished == {"running": FinishReason.LENGTH, "next": FinishReason.LENGTH}


def test_a_running_request_gives_back_what_it_holds() -> None:
    harness = _harness(40, {"a": 3})
    harness.add(make_request("other", 5, max_tokens=9))
    harness.add(make_request("refused", 9, max_tokens=9, adapter_id="a"))
    harness.step()
    harness.step()
    request = harness.live["refused"]
    assert len(request.page_ids) == 3 and harness.pool.num_free == 40 - 3 - 3 - 2
    harness.refuse("refused", ERROR)
    assert not request.page_ids and request.ended
    assert harness.pool.num_free == 40 - 3 - 2, "the adapter stays as a cache"
    assert harness.residency.num_pinned_pages == 0
    deltas = harness.step()
    assert _told(deltas) == [Delta("refused", [], None, ERROR)]
    assert [delta.request_id for delta in deltas if delta.error is None] == ["other"]
    harness.run_to_end()
    assert len(request.output_ids) == 2


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_request_in_flight_keeps_what_its_steps_use(num_steps: int) -> None:
    harness = _harness(12, {"a": 2}, max_running=2, inflight=2)
    request = make_request("refused", 6, max_tokens=9, adapter_id="a")
    harness.add(request)
    harness.add(make_request("other", 6, max_tokens=3))
    for _ in range(num_steps):
        harness.launch()
    harness.refuse("refused", ERROR)
    assert request.page_ids and harness.residency.num_pinned_pages == 2
    # Told with the next step, whatever of it is in flight still; its tokens are told no more.
    deltas = harness.step()
    assert [d for d in deltas if d.request_id == "refused"] == [Delta("refused", [], None, ERROR)]
    deltas = harness.flush()
    assert {delta.request_id for delta in deltas} <= {"other"}
    assert not request.page_ids and request.output_ids == []
    assert harness.residency.num_pinned_pages == 0
    assert harness.num_discarded == num_steps
    harness.run_to_end()
    assert harness.finished == {"other": FinishReason.LENGTH}


@both
def test_there_is_work_until_it_is_told(inflight: int) -> None:
    harness = _harness(12, inflight=inflight)
    harness.add(make_request("only", 6))
    harness.refuse("only", ERROR)
    assert harness.scheduler.num_waiting == harness.scheduler.num_running == 0
    assert harness.scheduler.has_work
    assert harness.step() == [Delta("only", [], None, ERROR)]
    assert not harness.scheduler.has_work
    assert harness.scheduler.take_refused() == {}


def test_each_is_told_its_own_reason() -> None:
    harness = _harness(40, max_running=2)
    errors = {}
    for index, name in enumerate("abcd"):
        harness.add(make_request(name, 5))
        errors[name] = InvalidRequestError(f"for {name}", "prompt") if index % 2 else ERROR
    harness.step()
    for name, error in errors.items():
        harness.refuse(name, error)
    assert {delta.request_id: delta.error for delta in harness.step()} == errors


def test_who_has_ended_or_is_unknown_is_not_refused() -> None:
    harness = _harness(40)
    harness.add(make_request("done", 5, max_tokens=1))
    harness.add(make_request("aborted", 5))
    harness.add(make_request("refused", 5, max_tokens=9))
    harness.step()
    harness.abort("aborted")
    harness.refuse("refused", ERROR)
    for name in ("done", "aborted", "refused", "unknown"):
        assert not harness.scheduler.refuse(name, ERROR)
    assert not harness.scheduler.abort("refused")
    assert harness.scheduler.take_refused() == {"refused": ERROR}
    harness.untold.clear()
    harness.run_to_end()


def test_a_request_that_was_preempted() -> None:
    harness = _harness(10, assumed=0)
    for name in ("old", "young"):
        harness.add(make_request(name, 12, max_tokens=16))
    young = harness.live["young"]
    while not young.num_preemptions:
        harness.step()
    assert young in harness.waiting
    told = len(young.output_ids)
    harness.refuse("young", ERROR)
    assert _told(harness.step()) == [Delta("young", [], None, ERROR)]
    harness.run_to_end()
    assert len(young.output_ids) == told and harness.finished == {"old": FinishReason.LENGTH}
