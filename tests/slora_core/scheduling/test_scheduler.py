"""The scheduler on a pretended device: known cases, and random operation sequences."""

import contextlib
import random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from slora_core.errors import InvalidRequestError, OverloadedError
from slora_core.memory.page_pool import pages_for
from slora_core.requests import FinishReason
from tests.slora_core.scheduling.harness import EOS, Harness, make_config, make_request


def _chunks(harness: Harness) -> list[tuple[str, int, int]]:
    """Run a step and return (id, start, end) of what it computed."""
    before = {request_id: r.num_computed for request_id, r in harness.live.items()}
    requests = dict(harness.live)
    harness.step()
    return [
        (request_id, before[request_id], request.num_computed)
        for request_id, request in requests.items()
        if request.num_computed != before[request_id]
    ]


def test_a_long_prompt_is_computed_in_contiguous_chunks_beside_decodes() -> None:
    harness = Harness(make_config(40, budget=10))
    harness.add(make_request("short", 6, max_tokens=9))
    harness.add(make_request("long", 25))
    assert _chunks(harness) == [("short", 0, 6), ("long", 0, 4)]
    assert _chunks(harness) == [("short", 6, 7), ("long", 4, 13)]
    assert _chunks(harness) == [("short", 7, 8), ("long", 13, 22)]
    assert _chunks(harness) == [("short", 8, 9), ("long", 22, 25)]
    assert _chunks(harness) == [("short", 9, 10), ("long", 25, 26)]
    harness.run_to_end()
    assert harness.finished == {"short": FinishReason.LENGTH, "long": FinishReason.LENGTH}


both = pytest.mark.parametrize("inflight", [1, 2])


def test_waiting_requests_start_in_order() -> None:
    harness = Harness(make_config(40, max_running=2))
    for name in "abcd":
        harness.add(make_request(name, 4, max_tokens=2))
    assert [name for name, *_ in _chunks(harness)] == ["a", "b"]
    harness.step()
    assert [name for name, *_ in _chunks(harness)] == ["c", "d"]
    harness.run_to_end()


@both
def test_the_head_of_the_queue_is_not_overtaken(inflight: int) -> None:
    harness = Harness(make_config(10, inflight=inflight))
    harness.add(make_request("running", 20, max_tokens=8))
    harness.step()
    harness.add(make_request("large", 30, max_tokens=8))
    harness.add(make_request("small", 1, max_tokens=1))
    assert [name for name, *_ in _chunks(harness)] == ["running"]
    harness.run_to_end()


@pytest.mark.parametrize("adapter_pages,fits", [(0, True), (2, True), (3, False)])
def test_a_request_that_could_never_fit_is_refused(adapter_pages: int, fits: bool) -> None:
    harness = Harness(make_config(10), {"a": adapter_pages})
    # 32 tokens are eight of the ten pages.
    request = make_request("r", 28, max_tokens=4, adapter_id="a")
    if fits:
        harness.add(request)
        harness.run_to_end()
        return
    with pytest.raises(
        InvalidRequestError, match="need 8 pages and the adapter 3; the pool has 10"
    ):
        harness.add(request)
    assert harness.scheduler.num_waiting == 0


@both
def test_finish_reasons(inflight: int) -> None:
    harness = Harness(make_config(40, inflight=inflight), eos_chance=1.0)
    harness.add(make_request("eos", 3))
    harness.add(make_request("ignores", 3, max_tokens=3, ignore_eos=True))
    harness.add(make_request("stop id", 3, max_tokens=3, ignore_eos=True, stop_token_ids=(EOS,)))
    harness.run_to_end()
    assert harness.finished == {
        "eos": FinishReason.STOP,
        "ignores": FinishReason.LENGTH,
        "stop id": FinishReason.STOP,
    }
    # Each stop was seen a step late.
    assert harness.num_discarded == (2 if inflight == 2 else 0)


def test_abort_anywhere() -> None:
    harness = Harness(make_config(12, budget=8, max_running=2), {"a": 2})
    for name in ("running", "prefilling", "waiting"):
        harness.add(make_request(name, 12, adapter_id="a"))
    harness.step()
    harness.step()
    for name in ("waiting", "prefilling", "running"):
        harness.abort(name)
        assert not harness.scheduler.abort(name), "it is gone"
    assert not harness.scheduler.abort("unknown")
    assert harness.pool.num_free == 10, "the adapter stays as a cache"
    assert harness.step() == []


@both
def test_the_youngest_is_preempted_and_recomputed(inflight: int) -> None:
    # Each believes it will have one token; together they outgrow the ten pages.
    harness = Harness(make_config(10, assumed=0, inflight=inflight))
    for name in ("old", "young"):
        harness.add(make_request(name, 12, max_tokens=16))
    young = harness.live["young"]
    harness.run_to_end()
    assert young.num_preemptions == 1
    assert harness.scheduler.num_preemptions == 1
    assert len(young.output_ids) == 16
    assert harness.num_blocked == (1 if inflight == 2 else 0)


@both
def test_idle_adapters_go_before_requests_are_preempted(inflight: int) -> None:
    harness = Harness(make_config(10, assumed=0, inflight=inflight), {"idle": 4})
    harness.add(make_request("first", 4, max_tokens=1, adapter_id="idle"))
    harness.run_to_end()
    assert harness.residency.resident_ids() == ["idle"]
    harness.add(make_request("a", 12, max_tokens=8))
    harness.add(make_request("b", 8, max_tokens=8))
    harness.run_to_end()
    assert harness.scheduler.num_preemptions == 0
    assert harness.residency.num_evictions == 1
    assert harness.num_blocked == 0


def test_requests_of_one_adapter_share_its_pages() -> None:
    harness = Harness(make_config(13), {"a": 4})
    for name in "xyz":
        harness.add(make_request(name, 4, max_tokens=4, adapter_id="a"))
    harness.step()
    assert harness.scheduler.num_running == 3
    assert harness.residency.num_loads == 1
    harness.run_to_end()


@both
def test_a_stalled_prefill_does_not_starve_behind_small_requests(inflight: int) -> None:
    """The oldest waits for pages while ever new requests, longer than assumed, take them."""
    harness = Harness(make_config(30, budget=64, assumed=1, inflight=inflight))
    for index in range(3):
        harness.add(make_request(f"early-{index}", 8, max_tokens=30))
    harness.step()
    harness.add(make_request("large", 60, max_tokens=4))
    large = harness.live["large"]
    for index in range(400):
        if "large" not in harness.live:
            break
        harness.add(make_request(f"late-{index}", 4, max_tokens=40))
        harness.step()
    assert "large" in harness.finished, f"{large.num_computed} of its tokens after 400 steps"


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(1, 30),
            st.integers(1, 60),
            st.sampled_from([None, "a", "b"]),
            st.sampled_from([7, 8]),
        ),
        min_size=2,
        max_size=12,
    ),
    page_tokens=st.sampled_from([1, 4, 16]),
    gap=st.integers(0, 5),
    inflight=st.sampled_from([1, 2]),
    prefix_caching=st.booleans(),
    shared=st.sampled_from([0.0, 0.5]),
)
def test_without_an_assumed_length_whole_prompts_never_preempt(
    requests, page_tokens, gap, inflight, prefix_caching, shared
) -> None:
    """The estimate of `admission_output_tokens` None is exact where each prompt is one chunk."""
    num_pages = pages_for(150, page_tokens)
    config = make_config(
        num_pages,
        page_tokens=page_tokens,
        budget=1000,
        inflight=inflight,
        prefix_caching=prefix_caching,
        shared=shared,
    )
    harness = Harness(config, {"a": 1, "b": 2})
    for index, (num_prompt, max_tokens, adapter_id, first_token) in enumerate(requests):
        harness.add(
            make_request(str(index), num_prompt, max_tokens, adapter_id, first_token=first_token)
        )
        for _ in range(gap):
            harness.step()
    harness.run_to_end()
    assert harness.scheduler.num_preemptions == harness.num_blocked == 0


ADAPTERS = {"small": 1, "medium": 3, "large": 6}

additions = st.tuples(
    st.just("add"),
    # Prompt, max_tokens.
    st.integers(1, 60),
    st.integers(1, 30),
    st.sampled_from([None, *ADAPTERS]),
    # Ignores the end of sequence.
    st.booleans(),
    # Its first token: which others it shares a prefix with.
    st.integers(7, 9),
    # Tokens of the answer that it comes with, at most.
    st.sampled_from([0, 0, 3, 20]),
)
operations = st.lists(
    st.one_of(
        # Half of the operations add.
        additions,
        additions,
        additions,
        additions,
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("flush")),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("refuse"), st.integers(0, 30)),
        st.tuples(st.just("drop"), st.sampled_from(sorted(ADAPTERS))),
    ),
    min_size=20,
    max_size=40,
)


@settings(max_examples=250, deadline=None)
@given(
    operations=operations,
    pool_tokens=st.integers(1, 200),
    page_tokens=st.sampled_from([1, 4, 16]),
    budget=st.sampled_from([1, 7, 16, 64]),
    max_running=st.integers(1, 8),
    assumed=st.sampled_from([None, 0, 1, 5]),
    max_slots=st.integers(1, 4),
    eos_chance=st.sampled_from([0.0, 0.1]),
    inflight=st.sampled_from([1, 2]),
    prefix_caching=st.booleans(),
    shared=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
)
def test_random_operations(
    operations,
    pool_tokens,
    page_tokens,
    budget,
    max_running,
    assumed,
    max_slots,
    eos_chance,
    inflight,
    prefix_caching,
    shared,
) -> None:
    # Room for a few requests of any size beside the drawn tokens, so that most are accepted.
    num_pages = pages_for(40 + pool_tokens, page_tokens)
    config = make_config(
        num_pages,
        page_tokens=page_tokens,
        budget=budget,
        max_running=max_running,
        assumed=assumed,
        inflight=inflight,
        prefix_caching=prefix_caching,
        shared=shared,
    )
    harness = Harness(config, ADAPTERS, max_slots, eos_chance)
    accepted = left = 0
    for number, (kind, *args) in enumerate(operations):
        if kind == "add":
            num_prompt, max_tokens, adapter_id, ignore_eos, first_token, num_output = args
            request = make_request(
                str(number),
                num_prompt,
                max_tokens,
                adapter_id,
                first_token=first_token,
                num_output=min(num_output, max_tokens - 1),
                ignore_eos=ignore_eos,
            )
            needed = pages_for(num_prompt + max_tokens, page_tokens) + ADAPTERS.get(adapter_id, 0)
            if needed > num_pages:
                with pytest.raises(InvalidRequestError):
                    harness.add(request)
            else:
                harness.add(request)
                accepted += 1
        elif kind == "step":
            for _ in range(args[0]):
                harness.step()
        elif kind == "flush":
            harness.flush()
        elif kind in ("abort", "refuse"):
            if harness.live:
                names = list(harness.live)
                name = names[args[0] % len(names)]
                if kind == "abort":
                    harness.abort(name)
                else:
                    harness.refuse(name, OverloadedError(name))
                left += 1
        else:
            harness.drop_adapter(args[0])
    harness.run_to_end()
    assert len(harness.finished) + left == accepted
    event(f"preemptions {min(harness.scheduler.num_preemptions, 3)}")
    event(f"evictions {min(harness.residency.num_evictions, 3)}")
    event(f"accepted {accepted // 5 * 5}")
    event(f"prefixes found {harness.scheduler.num_cached_prompt_tokens > 0}")


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("prefix_caching", [False, True])
@both
def test_random_operations_under_pressure(seed: int, prefix_caching: bool, inflight: int) -> None:
    """What shrinking favours is an idle pool; here each run overflows its own many times."""
    rng = random.Random(seed)
    page_tokens = rng.choice([1, 4, 16])
    num_pages = pages_for(rng.randint(100, 200), page_tokens)
    config = make_config(
        num_pages,
        page_tokens=page_tokens,
        budget=rng.choice([8, 16, 64]),
        max_running=rng.randint(8, 16),
        assumed=rng.choice([0, 1, 3]),
        inflight=inflight,
        prefix_caching=prefix_caching,
        shared=rng.choice([0.0, 0.3, 0.5, 0.8]),
    )
    sizes = {f"adapter-{index}": rng.randint(1, max(1, num_pages // 6)) for index in range(6)}
    max_slots = rng.randint(4, 6)
    # Few stops, which end requests before they outgrow the pool.
    harness = Harness(config, sizes, max_slots, 0.02 * (seed % 2), seed)
    accepted = aborted = 0
    for number in range(50):
        adapter_id = rng.choice([None, *sizes])
        num_prompt, max_tokens = rng.choice([1, 5, 30, 60]), rng.randint(10, 40)
        first_token = rng.randint(7, 8)
        request = make_request(
            str(number), num_prompt, max_tokens, adapter_id, first_token=first_token
        )
        with contextlib.suppress(InvalidRequestError):
            harness.add(request)
            accepted += 1
        for _ in range(rng.choice([0, 0, 0, 1, 4])):
            harness.step()
        if rng.random() < 0.1 and harness.live:
            harness.abort(rng.choice(list(harness.live)))
            aborted += 1
        if rng.random() < 0.1:
            harness.drop_adapter(rng.choice(list(sizes)))
    harness.run_to_end()
    assert len(harness.finished) == accepted - aborted >= 25
    assert harness.scheduler.num_preemptions > 0
    assert harness.residency.num_evictions > 0
    assert (harness.num_blocked > 0) == (inflight == 2)
    if not prefix_caching or page_tokens == 1:
        # Larger pages are seldom full of the same tokens, or seldom stay.
        assert (harness.scheduler.num_cached_prompt_tokens > 0) == prefix_caching
