"""How much may wait for its first token, and what those are told that may not."""

import pytest

from app.generation.backlog import (
    DEFAULT_RETRY_AFTER_S,
    MAX_RETRY_AFTER_S,
    RATE_WINDOW_S,
    Backlog,
)
from slora_core.errors import OverloadedError


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def begin(backlog, num_tokens, times=1):
    for _ in range(times):
        with backlog.waiting(num_tokens) as waiting:
            waiting.begin()


def test_requests_count_until_they_begin_or_are_left():
    backlog = Backlog(max_requests=2, max_tokens=100)
    with backlog.waiting(5) as first, backlog.waiting(6) as second:
        assert (backlog.num_requests, backlog.num_tokens) == (2, 11)
        with pytest.raises(OverloadedError, match="2 requests wait, as many as may"):
            backlog.check_room()
        second.begin()
        second.begin()
        assert (backlog.num_requests, backlog.num_tokens) == (1, 5)
        backlog.check_room()
        with pytest.raises(ValueError, match="left"), backlog.waiting(7):
            raise ValueError("left")
        assert (backlog.num_requests, backlog.num_tokens) == (1, 5)
        first.begin()
    assert (backlog.num_requests, backlog.num_tokens) == (0, 0)


def test_tokens_are_bounded_but_for_a_request_alone():
    backlog = Backlog(max_requests=10, max_tokens=100)
    with backlog.waiting(500):
        # Something may still come for nothing, as far as anybody knows by now.
        backlog.check_room()
        with (
            pytest.raises(OverloadedError, match="prompts of 500 tokens wait, and 100 may") as told,
            backlog.waiting(1),
        ):
            raise AssertionError("there is no room")
        assert told.value.retry_after_s == DEFAULT_RETRY_AFTER_S
    assert (backlog.num_requests, backlog.num_tokens) == (0, 0)
    with backlog.waiting(60), backlog.waiting(40):
        assert backlog.num_tokens == 100


def test_a_retry_is_told_by_the_rate_of_the_last_seconds(clock):
    backlog = Backlog(max_requests=1000, max_tokens=10**6, clock=clock)
    for _ in range(5):
        begin(backlog, 10, times=4)
        clock.now_s += 1
    waiting = [backlog.waiting(10) for _ in range(30)]
    for context in waiting:
        context.__enter__()
    # 20 have begun in 6 s, the one that has just begun counted.
    assert backlog.retry_after_s() == 9
    # By tokens, where those are slower.
    with backlog.waiting(600):
        assert backlog.retry_after_s() == 27
    # A rate is that of the window, and what is older is forgotten.
    clock.now_s += RATE_WINDOW_S
    assert backlog.retry_after_s() == DEFAULT_RETRY_AFTER_S
    begin(backlog, 10)
    assert backlog.retry_after_s() == 30
    clock.now_s += 5
    assert backlog.retry_after_s() == MAX_RETRY_AFTER_S
    begin(backlog, 10, times=1000)
    assert backlog.retry_after_s() == 1
    for context in waiting:
        context.__exit__(None, None, None)


def test_other_limits_hold_for_what_comes_later():
    backlog = Backlog(max_requests=1, max_tokens=100)
    with backlog.waiting(50):
        backlog.set_limits(max_requests=3, max_tokens=60)
        with backlog.waiting(10), pytest.raises(OverloadedError, match="60 tokens wait, and 60"):
            backlog.waiting(1).__enter__()
