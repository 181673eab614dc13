import pytest

from app.replica.adapter_heat import HALF_LIFE_S, MAX_COUNTED, MAX_TOLD, AdapterHeat
from tests.app.fakes import make_record

A, B, C = (make_record(name) for name in "abc")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_old_requests_count_less(clock):
    heat = AdapterHeat(clock)
    for _ in range(3):
        heat.add(A)
    clock.now += HALF_LIFE_S
    heat.add(B)
    heat.add(B)
    assert heat.hottest() == [(2.0, B), (1.5, A)]
    clock.now += 2 * HALF_LIFE_S
    assert heat.hottest() == [(0.5, B), (0.375, A)]


def test_counts_hold_for_weeks(clock):
    heat = AdapterHeat(clock)
    for _ in range(2000):
        heat.add(A)
        clock.now += HALF_LIFE_S
    heat.add(B)
    counts = {record: count for count, record in heat.hottest()}
    assert counts[A] == pytest.approx(1, abs=0.01) and counts[B] == pytest.approx(1)


def test_the_coldest_are_forgotten_when_there_are_too_many(clock):
    heat = AdapterHeat(clock)
    for number in range(MAX_COUNTED):
        heat.add(make_record(f"cold-{number}"))
    for record in (A, B, B, C, C, C):
        clock.now += 1
        heat.add(record)
    told = heat.hottest()
    assert [record for _, record in told[:3]] == [C, B, A] and len(told) == MAX_TOLD


def test_a_record_that_was_loaded_anew_replaces_its_own(clock):
    heat = AdapterHeat(clock)
    heat.add(A)
    moved = make_record("a", path="/elsewhere")
    heat.add(moved)
    assert heat.hottest() == [(2.0, moved)]
