import pytest

from app.routing.load_board import (
    FORGOTTEN_AFTER_S,
    FRESH_S,
    TOKENS_LIKE_A_REQUEST,
    Estimate,
    LoadBoard,
    board,
)
from slora_core.requests import LoadFigures


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def loads(clock):
    return LoadBoard(clock)


def figures(num_requests, num_waiting=0, queued_tokens=0, free_page_share=0.5):
    return LoadFigures("a", num_requests, num_waiting, queued_tokens, free_page_share)


def num_requests(loads, published=0):
    return loads.estimate("a", published).num_requests


def test_what_serve_says_counts_where_nothing_was_heard(loads):
    assert loads.estimate("a", 7) == Estimate(7, 7)
    loads.sent("a")
    # It is one of those.
    assert num_requests(loads, 7) == 7
    assert num_requests(loads, 0) == 1


def test_what_was_sent_since_is_added_to_what_was_heard(loads):
    for _ in range(3):
        loads.sent("a")
    loads.heard(figures(10))
    assert num_requests(loads) == 10
    loads.sent("a")
    assert num_requests(loads) == 11
    loads.ended("a")
    loads.ended("a")
    assert num_requests(loads) == 9
    # Two are on their way, so seven others and they.
    loads.counted("a", 9)
    assert num_requests(loads) == 9
    for _ in range(20):
        loads.sent("a")
    assert num_requests(loads) == 29


def test_a_burst_counts_before_the_replica_has_it(loads):
    for _ in range(50):
        loads.sent("a")
    loads.heard(figures(2))
    assert num_requests(loads) == 50


def test_old_figures_give_way_to_what_serve_says(loads, clock):
    loads.heard(figures(40, 10, 5000, 0.0))
    assert num_requests(loads, 3) == 40
    clock.now += FRESH_S + 0.1
    assert loads.estimate("a", 3) == Estimate(3, 3)


def test_prompts_that_wait_count_by_their_tokens(loads):
    loads.heard(figures(4, 2, queued_tokens=3 * TOKENS_LIKE_A_REQUEST))
    assert loads.estimate("a", 0) == Estimate(4, 7)
    loads.sent("a")
    loads.sent_prompt("a", 2 * TOKENS_LIKE_A_REQUEST)
    assert loads.estimate("a", 0) == Estimate(5, 10)
    loads.heard(figures(5))
    assert loads.estimate("a", 0) == Estimate(5, 5)


def test_a_replica_is_saturated_where_requests_wait_for_pages(loads):
    loads.heard(figures(4, 0, free_page_share=0.0))
    assert not loads.estimate("a", 0).is_saturated
    loads.heard(figures(4, 1, free_page_share=0.5))
    assert not loads.estimate("a", 0).is_saturated
    loads.heard(figures(4, 1, free_page_share=0.0))
    assert loads.estimate("a", 0).is_saturated


def test_who_died_stays_dead(loads, clock):
    assert not loads.is_dead("a")
    loads.died("a")
    loads.heard(figures(1))
    assert loads.is_dead("a") and not loads.is_dead("b")


def test_who_is_not_heard_of_any_more_is_forgotten(loads, clock):
    loads.died("a")
    loads.sent("busy")
    clock.now += FORGOTTEN_AFTER_S + 1
    loads.sent("b")
    assert not loads.is_dead("a")
    loads.ended("busy")
    assert loads.estimate("busy", 0).num_requests == 0


def test_a_process_has_one_board():
    assert board() is board()
