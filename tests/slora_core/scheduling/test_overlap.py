"""Steps planned while one is in flight: what is known then, and what is given back when."""

import pytest

from slora_core.requests import FinishReason, StepPlan
from tests.slora_core.scheduling.harness import Harness, make_config, make_request


def _harness(num_pages: int = 40, adapter_sizes: dict[str, int] | None = None, **config) -> Harness:
    return Harness(make_config(num_pages, inflight=2, **config), adapter_sizes or {})


def _shape(plan: StepPlan) -> list[tuple[str, int, int, bool, bool]]:
    return [(c.request.request_id, *c[1:5]) for c in plan.chunks]


def test_a_token_in_flight_is_the_input_of_the_next_step() -> None:
    harness = _harness(budget=10)
    harness.add(make_request("r", 13, max_tokens=3))
    # Request, start, end, samples, input_pending.
    assert _shape(harness.launch()) == [("r", 0, 10, False, False)]
    assert _shape(harness.launch()) == [("r", 10, 13, True, False)]
    assert harness.commit() == []
    assert _shape(harness.launch()) == [("r", 13, 14, True, True)]
    assert len(harness.commit()) == 1
    # Committed meanwhile: what the plan said stays.
    plan = harness.launch()
    assert _shape(plan) == [("r", 14, 15, True, True)]
    assert len(harness.commit()) == 1
    assert _shape(plan) == [("r", 14, 15, True, True)]
    assert plan.chunks[0].token_index == 2


def test_an_input_that_is_known_is_not_pending() -> None:
    harness = _harness()
    harness.add(make_request("r", 5))
    harness.launch()
    harness.flush()
    assert _shape(harness.launch()) == [("r", 5, 6, True, False)]


def test_nothing_is_planned_beyond_max_tokens() -> None:
    harness = _harness()
    harness.add(make_request("r", 5, max_tokens=2))
    harness.launch()
    harness.launch()
    assert harness.launch().chunks == [], "both tokens are in flight"
    assert harness.scheduler.num_running == 1
    assert [delta.finish_reason for delta in harness.flush()] == [None, FinishReason.LENGTH]
    assert harness.num_discarded == 0


def test_a_stop_is_seen_one_step_late() -> None:
    harness = _harness()
    harness.eos_chance = 1.0
    request = make_request("r", 6)
    harness.add(request)
    harness.launch()
    harness.launch()
    assert [delta.finish_reason for delta in harness.commit()] == [FinishReason.STOP]
    # The second step writes its seventh token into its second page.
    assert (harness.scheduler.num_running, len(request.page_ids)) == (0, 2)
    assert harness.launch().chunks == []
    assert harness.commit() == []
    assert (harness.num_discarded, len(request.output_ids)) == (1, 1)
    assert harness.pool.num_free == 40


@pytest.mark.parametrize("num_steps", [1, 2])
def test_an_aborted_request_keeps_what_steps_in_flight_use(num_steps: int) -> None:
    harness = _harness(12, {"a": 2}, max_running=1)
    request = make_request("r", 6, max_tokens=9, adapter_id="a")
    harness.add(request)
    for _ in range(num_steps):
        harness.launch()
    harness.abort("r")
    assert not harness.scheduler.abort("r")
    harness.drop_adapter("a")
    # Its id is free, its place in the tables is not.
    harness.add(make_request("r", 4))
    for _ in range(num_steps):
        assert harness.residency.resident_ids() == ["a"] and request.page_ids
        assert harness.launch().chunks == []
        assert harness.commit() == []
    assert harness.residency.resident_ids() == [] and harness.pool.num_free == 12
    assert request.output_ids == []
    harness.run_to_end()
    assert harness.finished == {"r": FinishReason.LENGTH}


def test_pages_of_an_ended_request_count_until_they_are_free() -> None:
    """Of ten pages one that drains holds six; the next in the queue has to wait for them."""
    harness = _harness(10)
    harness.add(make_request("ended", 24, max_tokens=4))
    harness.launch()
    harness.abort("ended")
    harness.add(make_request("small", 4))
    harness.add(make_request("large", 12))
    assert [c.request.request_id for c in harness.launch().chunks] == ["small"]
    harness.flush()
    assert [c.request.request_id for c in harness.launch().chunks] == ["small", "large"]
    harness.run_to_end()


def test_preemption_waits_until_no_step_is_in_flight() -> None:
    # Both need a page for their 17th token, and one of nine is left, which "old" gets.
    harness = _harness(9, assumed=0)
    for name in ("old", "young"):
        harness.add(make_request(name, 12, max_tokens=16))
    for _ in range(5):
        harness.step()
    assert harness.pool.num_free == 1
    plan = harness.launch()
    assert plan.blocked and plan.chunks == [], "a step of some decodes alone is a waste"
    assert harness.pool.num_free == harness.scheduler.num_preemptions == 0
    harness.flush()
    plan = harness.launch()
    assert not plan.blocked
    assert _shape(plan) == [("old", 16, 17, True, False)]
    assert harness.live["young"].num_preemptions == 1
    harness.run_to_end()


def test_a_prefill_that_finds_no_pages_blocks_the_plan_behind_the_decodes() -> None:
    # Prompts advance by one token beside a decode, which takes the last of ten pages.
    harness = _harness(10, assumed=0, budget=2)
    harness.add(make_request("decode", 12, max_tokens=28))
    harness.add(make_request("prefill", 20))
    plan = harness.launch()
    while not plan.blocked:
        if len(harness.inflight) == 2:
            harness.commit()
        plan = harness.launch()
    assert [(c.request.request_id, c.start) for c in plan.chunks] == [("decode", 24)]
    assert harness.live["prefill"].num_computed == 12
    harness.flush()
    harness.launch()
    assert harness.live["prefill"].num_preemptions == 1
    harness.run_to_end()


def test_a_postponed_head_is_tried_again_though_nothing_was_given_back() -> None:
    """As the running request nears its end, less and less of its growth meets the next one's."""
    harness = _harness(100, page_tokens=1)
    harness.add(make_request("running", 10, max_tokens=60))
    harness.add(make_request("next", 10, max_tokens=60))
    harness.launch()
    harness.commit()
    started = None
    for step in range(55):
        harness.step()
        if started is None and harness.scheduler.num_running == 2:
            started = step
    # The peak of both fits after about 40 steps; it is looked at every eighth.
    assert started is not None and 35 <= started <= 48
    harness.run_to_end()
    assert harness.scheduler.num_preemptions == 0
