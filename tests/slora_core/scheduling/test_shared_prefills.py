"""Prompts beside a long one: who is computed when, in steps, and how long the long one takes."""

import random
import statistics

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from slora_core.requests import StepPlan
from slora_core.scheduling.prefill_budget import oldest_share
from tests.slora_core.scheduling.harness import Harness, make_config, make_request

both = pytest.mark.parametrize("inflight", [1, 2])


def _shape(plan: StepPlan) -> dict[str, tuple[int, int]]:
    return {chunk.request.request_id: chunk[1:3] for chunk in plan.chunks}


def _step(harness: Harness) -> dict[str, tuple[int, int]]:
    """Run a step; the tokens of each request in it."""
    shape = _shape(harness.launch())
    harness.commit()
    return shape


def _first_tokens(harness: Harness) -> dict[str, int]:
    """Run to the end: the step that gave each request its first token, from 1."""
    steps: dict[str, int] = {}
    while harness.live or harness.inflight:
        for delta in harness.step():
            steps.setdefault(delta.request_id, harness.num_steps)
    return steps


def _long_and_short(shared: float, inflight: int, *, num_long: int, num_short: int):
    config = make_config(
        1024,
        page_tokens=16,
        budget=512,
        max_running=64,
        assumed=256,
        inflight=inflight,
        shared=shared,
    )
    harness = Harness(config)
    for index in range(num_long):
        harness.add(make_request(f"long-{index}", 7261, max_tokens=4))
    for index in range(num_short):
        harness.add(make_request(f"short-{index}", 20 + index % 21, max_tokens=8))
    steps = _first_tokens(harness)
    short = [step for name, step in steps.items() if name.startswith("short")]
    return steps.get("long-0"), statistics.median(short) if short else None


@both
def test_sixty_short_requests_behind_a_prompt_of_7261_tokens(inflight: int) -> None:
    alone, _ = _long_and_short(0.5, inflight, num_long=1, num_short=0)
    _, short_alone = _long_and_short(0.5, inflight, num_long=0, num_short=60)
    assert (alone, short_alone) == (15, 2)
    # Each of the short ones used to wait for the whole of the long one.
    assert _long_and_short(0.0, inflight, num_long=1, num_short=60) == (15, 16)
    long, short = _long_and_short(0.5, inflight, num_long=1, num_short=60)
    # They have half of each step, and the long one has it again when they are through.
    assert short == 4 == 2 * short_alone
    assert long == 19 < 2 * alone
    # A smaller share is less for them and more for the long one.
    long_of_quarter, short_of_quarter = _long_and_short(0.25, inflight, num_long=1, num_short=60)
    assert long_of_quarter <= long and short < short_of_quarter <= 8


def test_more_long_prompts_in_the_queue_hold_nobody_up() -> None:
    # Each starts in its turn, and none has a token before the short ones behind them.
    harness = Harness(make_config(200, budget=20, max_running=8))
    for name in ("first", "second", "third"):
        harness.add(make_request(name, 120))
    harness.add(make_request("short", 7))
    assert _step(harness) == {"first": (0, 13), "short": (0, 7)}
    assert [request.request_id for request in harness.running] == [
        "first",
        "second",
        "third",
        "short",
    ]
    # A prompt that takes longer than the oldest has nothing of it before that ends.
    assert _step(harness) == {"first": (13, 32), "short": (7, 8)}
    harness.run_to_end()


def test_the_shortest_go_first_within_their_share() -> None:
    harness = Harness(make_config(200, budget=32, max_running=8))
    for name, num_prompt in (("long", 100), ("middle", 40), ("nine", 9), ("three", 3)):
        harness.add(make_request(name, num_prompt))
    # Half of the step for the three: the longest of them has what is left in whole pages.
    assert _step(harness) == {"long": (0, 16), "three": (0, 3), "nine": (0, 9), "middle": (0, 4)}
    # Now two decode, and thirty tokens are for prompts.
    shape = _step(harness)
    assert (shape["long"], shape["middle"]) == ((16, 34), (4, 16))
    harness.run_to_end()


def test_what_does_not_end_with_a_page_is_the_oldest_prompts() -> None:
    harness = Harness(make_config(200, budget=20, page_tokens=16))
    harness.add(make_request("long", 100))
    harness.add(make_request("middle", 50))
    # No page ends within the ten tokens.
    assert _step(harness) == {"long": (0, 20)}
    harness.add(make_request("short", 5))
    assert _step(harness) == {"long": (20, 35), "short": (0, 5)}
    harness.run_to_end()


def test_a_step_with_room_for_all_is_that_of_first_come() -> None:
    """So steps that fit into a graph, which are small, stay as they are."""
    shapes = []
    for shared in (0.0, 0.5):
        harness = Harness(make_config(400, budget=200, max_running=16, shared=shared))
        for index in range(10):
            harness.add(make_request(str(index), 3 + 7 * index % 23))
        harness.add(make_request("half of the step", 60))
        shapes.append(_shape(harness.launch()))
        harness.run_to_end()
    assert shapes[0] == shapes[1] and len(shapes[0]) == 11


def test_without_a_share_prompts_are_computed_one_after_another() -> None:
    harness = Harness(make_config(400, budget=20, max_running=16, shared=0.0))
    rng = random.Random(0)
    names = [str(index) for index in range(40)]
    for name in names:
        harness.add(make_request(name, rng.randint(1, 60)))
    steps = {}
    while harness.live:
        for delta in harness.step():
            steps.setdefault(delta.request_id, harness.num_steps)
        assert sum(request.num_uncomputed > 1 for request in harness.running) <= 1
    assert sorted(names, key=steps.__getitem__) == names


def test_a_head_that_does_not_fit_is_not_overtaken_beside_a_long_prompt() -> None:
    # Thirty pages: the long one takes 21 to its end, the next one 13.
    harness = Harness(make_config(30, budget=20))
    harness.add(make_request("long", 80))
    harness.add(make_request("large", 48))
    harness.add(make_request("small", 4))
    for _ in range(3):
        assert list(_step(harness)) == ["long"]
    harness.run_to_end()
    assert harness.scheduler.num_preemptions == 0


@both
def test_the_oldest_prompt_has_its_pages_before_those_that_overtook_it(inflight: int) -> None:
    # Each believes that it will have one token; the short ones outgrow the pool meanwhile.
    harness = Harness(make_config(40, budget=8, assumed=0, inflight=inflight))
    harness.add(make_request("long", 100, max_tokens=4))
    for index in range(5):
        harness.add(make_request(f"short-{index}", 3, max_tokens=60))
    long = harness.live["long"]
    while "long" in harness.live:
        harness.step()
    assert long.num_preemptions == 0
    assert harness.scheduler.num_preemptions > 0
    harness.run_to_end()


# Requests that come in each of some steps, then for ever again: prompt, max_tokens.
arrivals = st.lists(
    st.lists(st.tuples(st.integers(1, 80), st.integers(1, 12)), max_size=4), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(
    num_prompt=st.integers(1, 400),
    arrivals=arrivals,
    fraction=st.sampled_from([0.0, 0.2, 0.5, 0.7, 0.9]),
    budget=st.sampled_from([12, 32, 100]),
    page_tokens=st.sampled_from([1, 4, 16]),
    prefix_caching=st.booleans(),
    inflight=st.sampled_from([1, 2]),
)
def test_a_prompt_ends_within_its_bound_whoever_comes(
    num_prompt, arrivals, fraction, budget, page_tokens, prefix_caching, inflight
) -> None:
    """However many come behind it, and however short they are.

    Of a step at most seven tokens are decodes. Any prompt is computed when, one after another, the
    ones that started before it have had their shares of as many steps as they take, and it its own.
    """
    config = make_config(
        4000,
        page_tokens=page_tokens,
        budget=budget,
        max_running=8,
        shared=fraction,
        prefix_caching=prefix_caching,
        inflight=inflight,
    )
    harness = Harness(config)
    share = oldest_share(budget - 7, fraction)
    harness.add(make_request("first", num_prompt, max_tokens=2))
    bounds: dict[str, int] = {}
    number = waited = 0
    while not bounds or any(name in harness.live for name in list(bounds)[:12]):
        for length, max_tokens in arrivals[number % len(arrivals)]:
            if harness.scheduler.num_waiting < 10:
                request = make_request(f"{number}-{len(harness.live)}", length, max_tokens)
                harness.add(request)
        harness.step()
        number += 1
        ahead = 0
        for request in harness.running:
            if request.num_uncomputed <= 1:
                continue
            ahead += -(-request.num_uncomputed // share)
            bound = bounds.setdefault(request.request_id, number + ahead)
            assert number < bound, f"{request.request_id} has waited since it started"
            waited += 1
        bounds.setdefault("first", number)
    assert bounds["first"] <= -(-num_prompt // share)
    event(f"prompts waited {min(waited, 40) // 10 * 10} steps")
    for name in list(harness.live):
        harness.abort(name)
    harness.run_to_end()


@pytest.mark.parametrize("num_middle", [60, 300])
def test_a_middle_prompt_is_not_overtaken_for_ever(num_middle: int) -> None:
    """Shorter ones fill their share of each step; its turn comes when the long one has ended."""
    harness = Harness(make_config(1000, budget=24, max_running=8, page_tokens=1))
    harness.add(make_request("long", 400))
    harness.add(make_request("middle", num_middle))
    steps: dict[str, int] = {}
    while "middle" not in steps:
        while harness.scheduler.num_waiting < 4:
            harness.add(make_request(f"{harness.num_steps}-{len(harness.live)}", 6, max_tokens=1))
        for delta in harness.step():
            steps.setdefault(delta.request_id, harness.num_steps)
    share = 12
    assert 400 // 24 < steps["long"] <= 1 + 400 // share
    assert steps["middle"] <= steps["long"] + 1 + num_middle // share
    # Nothing of it was computed before, and it has no less afterwards.
    assert steps["middle"] >= steps["long"] + num_middle // 24
    for name in list(harness.live):
        harness.abort(name)


@pytest.mark.parametrize(
    "lengths,num_pages,budget",
    [
        ((8, 512), 1536, 512),
        # Nearly all prompts take more than a step, and the pool is full.
        ((8, 3000), 800, 512),
    ],
)
def test_a_trace_takes_no_more_steps_than_first_come(
    lengths: tuple[int, int], num_pages: int, budget: int
) -> None:
    num_steps, first_tokens = [], []
    for shared in (0.0, 0.5):
        rng = random.Random(7)
        sizes = {f"adapter-{index}": rng.randint(4, 30) for index in range(8)}
        config = make_config(
            num_pages, page_tokens=16, budget=budget, max_running=64, assumed=256, shared=shared
        )
        harness = Harness(config, sizes, max_slots=8)
        for index in range(50):
            num_prompt, max_tokens = rng.randint(*lengths), rng.randint(8, 60)
            adapter_id = rng.choice([None, *sizes])
            harness.add(make_request(str(index), num_prompt, max_tokens, adapter_id))
            if index % 3 == 0:
                harness.step()
        steps = _first_tokens(harness)
        num_steps.append(harness.num_steps)
        first_tokens.append(statistics.mean(steps.values()))
    assert num_steps[1] <= 1.02 * num_steps[0]
    assert first_tokens[1] <= 1.02 * first_tokens[0]
