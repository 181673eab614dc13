import pytest

from app.routing.hot_keys import ADAPTERS_KEY, PREFIXES_KEY, TOTAL_KEY, HotKeys
from app.routing.order import Affinity
from app.routing.prefixes import prefix_keys

PROMPT = list(range(200))
KEYS = prefix_keys("", PROMPT, 16)


def hot_keys(totals, adapters=(), prefixes=()):
    """Every replica has the same of each key."""
    stats = [
        {TOTAL_KEY: total, ADAPTERS_KEY: dict(adapters), PREFIXES_KEY: dict(prefixes)}
        for total in totals
    ]
    return HotKeys(stats, spill_queue_len=8, page_tokens=16)


@pytest.mark.parametrize(
    ("totals", "load", "num_homes"),
    [
        # In all 4 x load; a part is 8 at least, and 100 of 400.
        ([10, 10, 10, 10], 1, 1),
        ([10, 10, 10, 10], 2, 1),
        ([10, 10, 10, 10], 4, 2),
        ([100] * 4, 25, 1),
        ([100] * 4, 26, 2),
        ([100] * 4, 60, 3),
        ([100] * 4, 100, 4),
    ],
)
def test_an_adapter_needs_homes_by_its_part_of_the_load(totals, load, num_homes):
    assert hot_keys(totals, [("a", load)]).num_homes("a") == num_homes


def test_a_cold_adapter_has_one_home_and_no_prefix():
    hot = hot_keys([100] * 4, [("a", 80)])
    assert hot.affinity("b", PROMPT) == Affinity("b")
    assert hot.affinity("a", PROMPT) == Affinity("a", 4, prefix_keys("a", PROMPT, 16)[0])
    assert hot.affinity("a", PROMPT[:15]) == Affinity("a", 4)


def test_the_base_model_goes_by_what_is_not_shared_by_too_many():
    assert hot_keys([9] * 4).affinity("", PROMPT) == Affinity("", 4, KEYS[0])
    warm = hot_keys([100] * 4, prefixes=[(KEYS[4], 25)])
    assert warm.affinity("", PROMPT).prefix == KEYS[0]
    hot = hot_keys([100] * 4, prefixes=[(KEYS[4], 26)])
    assert hot.affinity("", PROMPT).prefix == KEYS[5]
    assert hot.affinity("", PROMPT[: 5 * 16]).prefix == ""


def test_a_spread_prefix_is_seen_in_each_of_many_replicas():
    """One that would be below what they publish, once spread, stays where it is."""
    assert hot_keys([2] * 16, prefixes=[(KEYS[4], 1.4)]).affinity("", PROMPT).prefix == KEYS[0]
    assert hot_keys([2] * 16, prefixes=[(KEYS[4], 1.6)]).affinity("", PROMPT).prefix == KEYS[5]


def test_with_one_replica_or_none_nothing_matters():
    assert HotKeys([{}], 8, 16).affinity("", PROMPT) == Affinity("")
    assert HotKeys([], 8, 16).affinity("a", PROMPT) == Affinity("a")
