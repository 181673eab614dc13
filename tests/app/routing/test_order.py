from collections import Counter
from dataclasses import replace

import pytest

from app.routing.order import LoadBound, ReplicaLoad, RoutingKeys, homes, order_replicas

ADAPTERS = [f"adapter-{i:04d}" for i in range(2000)]


def idle(num_replicas):
    return [ReplicaLoad(str(rank), 0) for rank in range(num_replicas)]


def order(key, replicas, conversation="", width=1):
    return order_replicas(RoutingKeys(key, conversation, width), replicas, LoadBound(4, 1.25))


def test_every_replica_is_tried_once():
    replicas = [ReplicaLoad(str(rank), rank * 5) for rank in range(7)]
    for key in ("", "a", "b"):
        assert sorted(order(key, replicas)) == list(range(7))


@pytest.mark.parametrize("num_replicas", [2, 3, 5, 8])
def test_adapters_spread_evenly(num_replicas):
    counts = Counter(order(key, idle(num_replicas))[0] for key in ADAPTERS)
    ideal = len(ADAPTERS) / num_replicas
    assert len(counts) == num_replicas
    assert max(counts.values()) < 1.2 * ideal


@pytest.mark.parametrize("num_replicas", [2, 3, 4])
def test_a_new_replica_moves_only_what_it_takes(num_replicas):
    before = [order(key, idle(num_replicas))[0] for key in ADAPTERS]
    after = [order(key, idle(num_replicas + 1))[0] for key in ADAPTERS]
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {num_replicas}
    assert len(moved) / len(ADAPTERS) == pytest.approx(1 / (num_replicas + 1), abs=0.04)


def test_the_order_does_not_depend_on_the_position_in_the_list():
    replicas = idle(5)
    for key in ADAPTERS[:50]:
        ranks = [replicas[i].rank_in_deployment for i in order(key, replicas)]
        turned = replicas[2:] + replicas[:2]
        assert [turned[i].rank_in_deployment for i in order(key, turned)] == ranks


def test_an_adapter_stays_while_its_replica_is_within_the_bound():
    for key in ADAPTERS[:50]:
        first, second = order(key, idle(2))
        replicas = idle(2)
        replicas[first] = ReplicaLoad(str(first), 3)
        assert order(key, replicas)[0] == first
        replicas[first] = ReplicaLoad(str(first), 4)
        assert order(key, replicas) == [second, first]


def test_equally_busy_replicas_keep_their_adapters():
    for key in ADAPTERS[:50]:
        first = order(key, idle(4))[0]
        replicas = [ReplicaLoad(str(rank), 40 + (rank == first)) for rank in range(4)]
        assert order(key, replicas)[0] == first


def test_a_hot_adapter_spills_to_the_same_next_replica():
    key = "hot"
    preferred = order(key, idle(4))
    loads = [0, 0, 0, 0]
    for _ in range(8):
        replicas = [ReplicaLoad(str(rank), loads[rank]) for rank in range(4)]
        loads[order(key, replicas)[0]] += 1
    assert loads[preferred[0]] == 4
    assert loads[preferred[1]] == 4


def test_no_replica_idles_while_a_hot_adapter_queues():
    loads = [0, 0, 0, 0]
    for _ in range(400):
        replicas = [ReplicaLoad(str(rank), loads[rank]) for rank in range(4)]
        loads[order("hot", replicas)[0]] += 1
    assert max(loads) <= 1.25 * 101 + 1
    assert min(loads) > 0


def test_base_model_requests_go_to_the_least_loaded():
    replicas = [ReplicaLoad("0", 3), ReplicaLoad("1", 1), ReplicaLoad("2", 2)]
    assert order("", replicas) == [1, 2, 0]


def test_equal_replicas_share_the_base_model():
    counts = Counter(order("", idle(2))[0] for _ in range(200))
    assert min(counts.values()) > 50


def test_a_replica_without_engine_is_no_choice_and_does_not_count():
    replicas = [ReplicaLoad("0", 0, healthy=False), ReplicaLoad("1", 3), ReplicaLoad("2", 100)]
    for key in ("", *ADAPTERS[:20]):
        assert order(key, replicas) == [1, 2]
    assert order("a", [ReplicaLoad("0", 0, healthy=False)]) == []


@pytest.mark.parametrize("key", ["", "a"])
def test_a_conversation_has_a_replica_of_its_own(key):
    """Of all for the base model, of those that share its adapter otherwise; evenly."""
    width = 3
    allowed = range(5) if key == "" else order(key, idle(5))[:width]
    counts = Counter()
    for number in range(1000):
        first = order(key, idle(5), f"c{number}", width)
        assert first == order(key, idle(5), f"c{number}", width)
        counts[first[0]] += 1
        if key:
            assert set(first[:width]) == set(allowed)
            assert first[width:] == order(key, idle(5))[width:]
    assert counts.keys() == set(allowed)
    assert max(counts.values()) < 1.2 * 1000 / len(allowed)


def test_a_new_replica_moves_only_the_conversations_that_it_takes():
    names = [f"c{number}" for number in range(2000)]
    before = [order("", idle(3), name)[0] for name in names]
    after = [order("", idle(4), name)[0] for name in names]
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {3}
    assert len(moved) / len(names) == pytest.approx(1 / 4, abs=0.03)


def test_a_conversation_leaves_a_replica_that_is_beyond_the_bound():
    for number in range(50):
        home, second = order("", idle(3), f"c{number}")[:2]
        replicas = idle(3)
        replicas[home] = ReplicaLoad(str(home), 3)
        assert order("", replicas, f"c{number}")[0] == home
        replicas[home] = ReplicaLoad(str(home), 4)
        assert order("", replicas, f"c{number}")[0] == second


def test_an_adapter_that_is_spread_goes_to_the_least_loaded_of_its_replicas():
    first, second, third = order("hot", idle(3))
    replicas = idle(3)
    replicas[first] = ReplicaLoad(str(first), 2)
    assert order("hot", replicas, width=2) == [second, first, third]
    replicas[second] = ReplicaLoad(str(second), 3)
    assert order("hot", replicas, width=2) == [first, second, third]
    # Beyond the bound it goes on as another adapter would.
    replicas[first], replicas[second] = ReplicaLoad(str(first), 20), ReplicaLoad(str(second), 20)
    replicas[third] = ReplicaLoad(str(third), 3)
    assert order("hot", replicas, width=2)[0] == third


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_replica_that_comes_takes_one_home_at_most(width):
    for key in ADAPTERS[:50]:
        for num_replicas in range(width, 12):
            ranks = [str(rank) for rank in range(num_replicas + 1)]
            before, after = homes(key, width, ranks[:-1]), homes(key, width, ranks)
            taken = [new for old, new in zip(before, after, strict=True) if old != new]
            assert taken in ([], [num_replicas])
            assert set(after) == set(order(key, idle(num_replicas + 1))[:width])


def test_there_are_no_more_homes_than_replicas():
    assert sorted(homes("a", 9, list("012"))) == [0, 1, 2]
    assert homes("a", 2, []) == []


def test_a_full_replica_keeps_its_adapters_and_gets_no_request():
    for key in ADAPTERS[:50]:
        first, second, third = order(key, idle(3))
        replicas = [ReplicaLoad(str(rank), 3) for rank in range(3)]
        replicas[first] = replace(replicas[first], is_full=True)
        assert order(key, replicas) == order(key, replicas, width=2) == [second, third]


def test_a_replica_whose_requests_wait_for_pages_is_beyond_the_bound():
    for key in ADAPTERS[:50]:
        first, second = order(key, idle(2))
        replicas = [ReplicaLoad(str(rank), 2) for rank in range(2)]
        replicas[first] = replace(replicas[first], is_saturated=True)
        assert order(key, replicas) == [second, first]


def test_one_request_at_a_time_stays_at_the_first_of_its_homes():
    for key in ADAPTERS[:50]:
        first, second, third = order(key, idle(3))
        replicas = idle(3)
        # The last one is still counted.
        replicas[first] = ReplicaLoad(str(first), 1)
        assert order(key, replicas, width=2) == [first, second, third]
