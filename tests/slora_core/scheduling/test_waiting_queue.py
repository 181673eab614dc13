"""In which order requests start: that of the queue, of which the scheduler has none of its own."""

import random
from bisect import insort
from collections.abc import Iterator
from dataclasses import replace

import pytest

from slora_core.requests import RequestState
from slora_core.scheduling.waiting_queue import FirstComeQueue, WaitingQueue
from tests.slora_core.scheduling.harness import Harness, make_config, make_request

both = pytest.mark.parametrize("inflight", [1, 2])


def _names(queue: WaitingQueue) -> list[str]:
    return [request.request_id for request in queue]


def _drain(queue: WaitingQueue) -> list[str]:
    """Start all, as the scheduler does."""
    names = []
    while (head := queue.head()) is not None:
        names.append(head.request_id)
        queue.remove(head)
    return names


def test_first_come_first_served() -> None:
    queue = FirstComeQueue()
    assert queue.head() is None and len(queue) == 0
    for name in "abc":
        queue.add(make_request(name, 1))
    assert len(queue) == 3 and _names(queue) == list("abc")
    assert queue.head() is queue.head(), "the head stays"
    assert _drain(queue) == list("abc")
    assert len(queue) == 0 and _names(queue) == []


def test_requests_of_an_engine_that_has_ended_go_before_new_ones() -> None:
    queue = FirstComeQueue()
    moved = [RequestState(replace(make_request(name, 1).request, num_moves=1)) for name in "mn"]
    new, preempted = [make_request(name, 1) for name in "ab"], make_request("p", 1)
    for request in (new[0], moved[0], new[1], moved[1]):
        queue.add(request)
    queue.put_back(preempted)
    assert len(queue) == 5 and _names(queue) == list("pmnab")
    queue.remove(moved[0])
    assert _drain(queue) == list("pnab")
    with pytest.raises(KeyError):
        queue.remove(preempted)


def test_preempted_requests_go_first_and_the_older_before_the_younger() -> None:
    queue = FirstComeQueue()
    queue.add(make_request("waiting", 1))
    # The youngest is preempted first.
    for name in ("younger", "older"):
        queue.put_back(make_request(name, 1))
    queue.add(make_request("late", 1))
    assert _names(queue) == ["older", "younger", "waiting", "late"] == _drain(queue)


def test_a_request_leaves_from_anywhere() -> None:
    queue = FirstComeQueue()
    requests = [make_request(name, 1) for name in "abcd"]
    for request in requests:
        queue.add(request)
    for index in (1, 0, 3):
        queue.remove(requests[index])
    assert _names(queue) == ["c"] and queue.head() is requests[2]


def test_requests_of_one_id_are_not_one() -> None:
    """What left may drain while another with its id waits."""
    queue = FirstComeQueue()
    first, second = make_request("r", 1), make_request("r", 1)
    queue.add(first)
    queue.add(second)
    queue.remove(first)
    assert queue.head() is second and len(queue) == 1


class ShortestFirst:
    """By the length of the prompt, new or preempted."""

    def __init__(self) -> None:
        self._requests: list[RequestState] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._requests)

    def add(self, request: RequestState) -> None:
        insort(self._requests, request, key=shortest)

    put_back = add

    def head(self) -> RequestState | None:
        return self._requests[0] if self._requests else None

    def remove(self, request: RequestState) -> None:
        self._requests.remove(request)


def shortest(request: RequestState) -> tuple[int, str]:
    """Names settle ties."""
    return len(request.prompt_ids), request.request_id


def _harness(num_pages: int, sizes: dict[str, int] | None = None, **config) -> Harness:
    return Harness(
        make_config(num_pages, **config), sizes or {}, policy=ShortestFirst(), order=shortest
    )


def _started(harness: Harness) -> list[str]:
    """Launch a step; who started in it, in order."""
    before = set(harness.running)
    harness.launch()
    return [request.request_id for request in harness.running if request not in before]


@both
def test_the_scheduler_has_no_order_of_its_own(inflight: int) -> None:
    harness = _harness(40, max_running=2, inflight=inflight)
    for name, num_prompt in (("long", 20), ("short", 2), ("middle", 9), ("shortest", 1)):
        harness.add(make_request(name, num_prompt, max_tokens=1))
    assert _started(harness) == ["shortest", "short"]
    harness.flush()
    harness.add(make_request("late", 3, max_tokens=1))
    assert _started(harness) == ["late", "middle"]
    harness.flush()
    assert _started(harness) == ["long"]
    harness.run_to_end()


@both
def test_what_comes_later_may_go_before_a_head_that_did_not_fit(inflight: int) -> None:
    """First come, first served has the small one wait: `test_the_head_of_the_queue_is_not...`."""
    harness = _harness(10, inflight=inflight)
    harness.add(make_request("running", 20, max_tokens=8))
    harness.step()
    harness.add(make_request("large", 30, max_tokens=8))
    harness.step()
    assert harness.scheduler.num_waiting == 1
    harness.add(make_request("small", 1, max_tokens=1))
    assert _started(harness) == ["small"]
    harness.run_to_end()


@both
def test_a_preempted_request_starts_again_when_the_queue_says_so(inflight: int) -> None:
    # Each believes it will have one token; together they outgrow the ten pages.
    harness = _harness(10, assumed=0, inflight=inflight)
    for name in ("old", "young"):
        harness.add(make_request(name, 12, max_tokens=16))
    young = harness.live["young"]
    while not young.num_preemptions:
        harness.step()
    harness.add(make_request("short", 10, max_tokens=4))
    started = []
    while young in harness.waiting:
        started += _started(harness)
        harness.flush()
    # First come, first served has it the other way round; "short" may be preempted meanwhile.
    assert started[0] == "short" and started[-1] == "young"
    harness.run_to_end()


@pytest.mark.parametrize("seed", range(30))
@both
def test_random_operations(seed: int, inflight: int) -> None:
    """The harness asserts of each step that nobody who started was overtaken."""
    rng = random.Random(seed)
    sizes = {"a": 2, "b": 5, "c": 9}
    harness = _harness(
        40,
        sizes,
        budget=rng.choice([8, 16, 64]),
        assumed=rng.choice([0, 3]),
        inflight=inflight,
        prefix_caching=seed % 2 == 1,
        shared=rng.choice([0.0, 0.5]),
    )
    left = 0
    for number in range(50):
        num_prompt, max_tokens = rng.randint(1, 60), rng.randint(10, 40)
        adapter_id = rng.choice([None, *sizes])
        harness.add(
            make_request(str(number), num_prompt, max_tokens, adapter_id, first_token=7 + seed % 3)
        )
        for _ in range(rng.choice([0, 0, 1, 4])):
            harness.step()
        if rng.random() < 0.1:
            harness.abort(rng.choice(list(harness.live)))
            left += 1
    harness.run_to_end()
    assert len(harness.finished) == 50 - left
    assert harness.scheduler.num_preemptions > 0
