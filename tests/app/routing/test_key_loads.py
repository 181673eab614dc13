from contextlib import ExitStack

import pytest

from app.routing.key_loads import FALL_S, KeyLoads

LEAST = 1.5


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def looked(loads, clock, seconds):
    """What is published after so long of two looks a second."""
    published = {}
    for _ in range(int(2 * seconds)):
        clock.now += 0.5
        published = loads.published()
    return published


def test_a_figure_follows_what_is_in_flight_up_fast_and_down_slowly(clock):
    loads = KeyLoads(LEAST, 10, clock)
    with ExitStack() as requests:
        for _ in range(10):
            requests.enter_context(loads.counted(["a"]))
        assert loads.published() == {}
        assert looked(loads, clock, 4)["a"] == pytest.approx(10, rel=0.1)
    assert looked(loads, clock, 3)["a"] > 7
    assert looked(loads, clock, FALL_S)["a"] == pytest.approx(3, abs=1)
    assert looked(loads, clock, FALL_S) == {} == looked(loads, clock, 1)


def test_short_requests_count_for_the_time_that_they_take(clock):
    loads = KeyLoads(LEAST, 10, clock)
    for _ in range(10):
        for _ in range(10):
            with ExitStack() as requests:
                for _ in range(4):
                    requests.enter_context(loads.counted(["a"]))
                clock.now += 0.04
            clock.now += 0.01
        published = loads.published()
    # None is there at any look.
    assert published["a"] == pytest.approx(3.2, rel=0.1)


def test_a_wavering_figure_stays_as_it_is(clock):
    loads = KeyLoads(LEAST, 10, clock)
    with ExitStack() as requests:
        for _ in range(20):
            requests.enter_context(loads.counted(["a"]))
        before = looked(loads, clock, 10)
        for number in range(40):
            with ExitStack() as more:
                for _ in range(number % 2):
                    more.enter_context(loads.counted(["a"]))
                assert looked(loads, clock, 0.5) == before


def test_keys_of_one_request_alone_are_not_published_or_kept(clock):
    loads = KeyLoads(LEAST, 10, clock)
    for number in range(100):
        with loads.counted([f"a{number}", f"b{number}"]):
            assert looked(loads, clock, 5) == {}
    assert looked(loads, clock, 0.5) == {} and not loads._loads


def test_the_keys_with_most_requests_are_published(clock):
    loads = KeyLoads(LEAST, 3, clock)
    with ExitStack() as requests:
        for number in range(8):
            for _ in range(number):
                requests.enter_context(loads.counted([f"key-{number}"]))
        assert set(looked(loads, clock, 10)) == {"key-5", "key-6", "key-7"}


def test_of_prefixes_that_all_go_on_alike_the_longest_is_published(clock):
    loads = KeyLoads(LEAST, 10, clock)
    with ExitStack() as requests:
        for number in range(12):
            branch = "left" if number < 8 else "right"
            requests.enter_context(loads.counted(["1", "2", "3", branch, f"own-{number}"]))
        assert set(looked(loads, clock, 10)) == {"3", "left", "right"}


def test_a_failed_request_is_counted_down(clock):
    loads = KeyLoads(LEAST, 10, clock)
    with pytest.raises(RuntimeError), loads.counted(["a"]):
        raise RuntimeError
    assert loads._loads["a"].num_requests == 0
