"""Requests that begin alike: what is computed once, what a full pool still admits, what stays."""

import random

import pytest

from slora_core.memory.page_pool import PageOwner
from slora_core.requests import Request, RequestState, SamplingParams
from tests.slora_core.scheduling.harness import Harness, make_config, make_request

both = pytest.mark.parametrize("inflight", [1, 2])


def _harness(num_pages: int, adapter_sizes: dict[str, int] | None = None, **config) -> Harness:
    config = make_config(num_pages, prefix_caching=True, **config)
    return Harness(config, adapter_sizes or {}, max_slots=8)


def _computed(harness: Harness) -> dict[str, tuple[int, int]]:
    """Launch a step: the tokens of each request in it."""
    return {chunk.request.request_id: chunk[1:3] for chunk in harness.launch().chunks}


@both
def test_a_prefix_is_computed_once_even_within_one_step(inflight: int) -> None:
    harness = _harness(60, inflight=inflight)
    for name in "abc":
        harness.add(make_request(name, 30, first_token=9))
    harness.add(make_request("other", 10))
    assert _computed(harness) == {"a": (0, 30), "b": (28, 30), "c": (28, 30), "other": (0, 10)}
    assert harness.scheduler.num_cached_prompt_tokens == 56
    assert harness.pool.num_owned(PageOwner.KV) == 8 + 1 + 1 + 3
    harness.run_to_end()


def test_adapters_do_not_share() -> None:
    harness = _harness(60, {"x": 2, "y": 2})
    for name in ("x", "y", "x again"):
        harness.add(make_request(name, 10, adapter_id=name[0]))
    harness.add(make_request("base", 10))
    computed = _computed(harness)
    assert computed == {"x": (0, 10), "x again": (8, 10), "y": (0, 10), "base": (0, 10)}
    harness.run_to_end()


def test_the_next_turn_finds_prompt_and_answer() -> None:
    harness = _harness(60)
    first = make_request("first", 10, max_tokens=10, ignore_eos=True)
    harness.add(first)
    harness.run_to_end()
    assert harness.prefixes.num_idle_pages == 4, "the last token's KV was never computed"
    prompt = [*first.prompt_ids, *first.output_ids, 5, 6, 7]
    harness.add(RequestState(Request(prompt, SamplingParams(max_tokens=4), request_id="second")))
    assert _computed(harness) == {"second": (16, 23)}
    harness.run_to_end()


def test_shared_pages_are_counted_once_when_requests_are_admitted() -> None:
    # Alone a request takes 12 of the 20 pages; each that shares its ten full ones takes two more.
    harness = _harness(20, max_running=4)
    harness.add(make_request("seed", 42, max_tokens=1))
    harness.run_to_end()
    for name in "abcd":
        harness.add(make_request(name, 42, max_tokens=4))
    assert sorted(_computed(harness)) == list("abcd")
    harness.run_to_end()
    assert harness.scheduler.num_preemptions == 0


@both
def test_idle_prefixes_make_room_for_requests_and_adapters(inflight: int) -> None:
    harness = _harness(12, {"x": 6}, inflight=inflight)
    harness.add(make_request("old", 40, max_tokens=1))
    harness.run_to_end()
    assert harness.pool.num_free == 2
    harness.add(make_request("x", 14, max_tokens=3, adapter_id="x"))
    harness.add(make_request("base", 42, max_tokens=2))
    harness.run_to_end()
    assert sorted(harness.finished) == ["base", "old", "x"]
    assert harness.scheduler.num_preemptions == 0


def test_a_prefix_in_use_is_not_evicted_for_its_own_adapter() -> None:
    """The pages that a starting request found are held before its adapter asks for room."""
    harness = _harness(12, {"x": 3, "y": 6})
    harness.add(make_request("first", 22, max_tokens=1, adapter_id="x"))
    harness.run_to_end()
    # It takes the pages of the idle adapter x, and KV of it.
    harness.add(make_request("between", 4, max_tokens=1, adapter_id="y"))
    harness.run_to_end()
    harness.add(make_request("second", 22, max_tokens=1, adapter_id="x"))
    harness.run_to_end()
    assert sorted(harness.finished) == ["between", "first", "second"]


def test_a_preempted_request_finds_what_is_left_of_its_pages() -> None:
    harness = _harness(10, assumed=0)
    for index, name in enumerate(("old", "young")):
        harness.add(make_request(name, 14, max_tokens=16, first_token=8 + index))
    young = harness.live["young"]
    while not young.num_preemptions:
        harness.step()
    assert young.num_computed == 0 and young in harness.waiting
    kept = harness.prefixes.match(None, young.token_ids(0, young.num_tokens))
    assert kept, "its first pages are the last to go"
    harness.run_to_end()
    assert len(young.output_ids) == 16


def test_an_aborted_request_leaves_what_it_had_computed() -> None:
    harness = _harness(20, inflight=2, budget=16)
    harness.add(make_request("r", 30))
    harness.launch()
    harness.abort("r")
    assert harness.prefixes.num_idle_pages == 0, "its step is in flight"
    harness.flush()
    assert harness.prefixes.num_idle_pages == 4
    harness.add(make_request("r", 30))
    assert _computed(harness) == {"r": (16, 30)}
    harness.run_to_end()


def test_a_dropped_adapter_leaves_nothing() -> None:
    harness = _harness(20, {"x": 2})
    harness.add(make_request("done", 10, max_tokens=2, adapter_id="x"))
    harness.run_to_end()
    harness.add(make_request("running", 10, max_tokens=8, adapter_id="x"))
    harness.step()
    harness.drop_adapter("x")
    harness.run_to_end()
    assert harness.pool.num_free == 20


def _prompt(name: str, seed: int, num_shared: int, num_own: int) -> RequestState:
    """`num_shared` tokens that go with the seed, then tokens of its own."""
    shared = random.Random(seed).choices(range(3, 1000), k=num_shared)
    own = random.Random(name).choices(range(3, 1000), k=num_own)
    return RequestState(
        Request(shared + own, SamplingParams(max_tokens=2, ignore_eos=True), request_id=name)
    )


def _run_to_end(harness: Harness) -> int:
    """How many tokens of prompts were computed."""
    num_tokens = 0
    while harness.live:
        plan = harness.launch()
        for chunk in plan.chunks:
            num_tokens += max(0, min(chunk.end, len(chunk.request.prompt_ids)) - chunk.start)
        harness.flush()
    return num_tokens


def test_a_prompt_waits_for_what_the_oldest_is_about_to_compute() -> None:
    harness = _harness(200, budget=20)
    harness.add(_prompt("first", 1, 80, 6))
    # The same document, and something else behind it.
    harness.add(_prompt("second", 1, 80, 3))
    harness.add(_prompt("other", 2, 0, 5))
    assert _computed(harness) == {"first": (0, 15), "other": (0, 5)}
    harness.flush()
    for start, end in ((15, 34), (34, 54), (54, 74)):
        shape = _computed(harness)
        harness.flush()
        assert shape.pop("other", None) in (None, (5, 6))
        assert shape == {"first": (start, end)}
    # The last of what they share, and at once what the second one has of its own.
    assert _computed(harness) == {"first": (74, 86), "second": (80, 83)}
    harness.flush()
    harness.run_to_end()


def test_a_prompt_that_was_overtaken_finds_what_the_shorter_one_computed() -> None:
    harness = _harness(200, budget=16)
    harness.add(_prompt("long", 1, 0, 100))
    harness.add(_prompt("longer", 2, 20, 9))
    assert _computed(harness) == {"long": (0, 8), "longer": (0, 8)}
    harness.flush()
    harness.add(_prompt("shorter", 2, 20, 3))
    # It goes on from where the other one is.
    longer = harness.live["longer"]
    assert _computed(harness) == {"long": (8, 16), "shorter": (8, 16)}
    harness.flush()
    assert (longer.num_matched_pages, harness.prefixes.num_shared_pages) == (0, 2)
    assert _computed(harness) == {"long": (16, 25), "shorter": (16, 23)}
    harness.flush()
    # Two pages that it computed and three that it found.
    assert (longer.num_matched_pages, harness.prefixes.num_shared_pages) == (5, 5)
    assert _computed(harness)["longer"] == (20, 24)
    assert harness.scheduler.num_cached_prompt_tokens == 8 + 12
    assert longer.num_cached_tokens == 12
    harness.flush()
    harness.run_to_end()


@pytest.mark.parametrize("shared", [0.0, 0.5])
@pytest.mark.parametrize("num_long", [0, 1])
def test_sharing_a_step_computes_no_prefix_twice(num_long: int, shared: float) -> None:
    harness = _harness(400, budget=64, max_running=30, shared=shared)
    for index in range(num_long):
        harness.add(_prompt(f"long-{index}", index, 0, 500))
    rng = random.Random(5)
    families = {seed: 4 * rng.randint(5, 70) for seed in range(10, 14)}
    num_own = 0
    for index in range(40):
        seed = rng.choice(list(families))
        own = rng.randint(2, 20)
        harness.add(_prompt(f"{seed}-{index}", seed, families[seed], own))
        num_own += own
    once = num_long * 500 + sum(families.values()) + num_own
    assert once <= _run_to_end(harness) <= 1.01 * once
