from collections import Counter
from dataclasses import replace

import pytest

from app.routing.order import Affinity, ReplicaLoad, homes, order_replicas

ADAPTERS = [f"adapter-{i:04d}" for i in range(2000)]
PREFIXES = [f"prefix-{i:04d}" for i in range(2000)]


def idle(num_replicas):
    return [ReplicaLoad(str(rank), 0) for rank in range(num_replicas)]


def loaded(*loads):
    return [ReplicaLoad(str(rank), load) for rank, load in enumerate(loads)]


def order(affinity, replicas, spill_queue_len=4, spill_factor=1.25):
    """`affinity` may be the name of an adapter."""
    if isinstance(affinity, str):
        affinity = Affinity(affinity)
    return order_replicas(affinity, replicas, spill_queue_len, spill_factor)


def prefix(name, adapter="", num_homes=1):
    return Affinity(adapter, num_homes, name)


def test_every_replica_is_tried_once():
    replicas = loaded(0, 5, 10, 15, 20, 25, 30)
    for affinity in ("", "a", "b", prefix("p"), prefix("p", "a", 3)):
        assert sorted(order(affinity, replicas)) == list(range(7))


@pytest.mark.parametrize("num_replicas", [2, 3, 5, 8])
def test_adapters_and_prefixes_spread_evenly(num_replicas):
    for keys in (map(Affinity, ADAPTERS), map(prefix, PREFIXES)):
        counts = Counter(order(key, idle(num_replicas))[0] for key in keys)
        ideal = len(ADAPTERS) / num_replicas
        assert len(counts) == num_replicas
        assert max(counts.values()) < 1.2 * ideal


def test_the_order_does_not_depend_on_the_position_in_the_list():
    replicas = idle(5)
    turned = replicas[2:] + replicas[:2]
    for name in ADAPTERS[:50]:
        for affinity in (Affinity(name), prefix(name), prefix(name, name, 5)):
            ranks = [replicas[i].rank_in_deployment for i in order(affinity, replicas)]
            assert [turned[i].rank_in_deployment for i in order(affinity, turned)] == ranks


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


def test_what_is_too_much_for_one_spills_to_the_same_next_replica():
    preferred = order("hot", idle(4))
    loads = [0, 0, 0, 0]
    for _ in range(8):
        loads[order("hot", loaded(*loads))[0]] += 1
    assert loads[preferred[0]] == 4
    assert loads[preferred[1]] == 4


def test_no_replica_idles_while_an_adapter_queues():
    loads = [0, 0, 0, 0]
    for _ in range(400):
        loads[order("hot", loaded(*loads))[0]] += 1
    assert max(loads) <= 1.25 * 101 + 1
    assert min(loads) > 0


@pytest.mark.parametrize("num_homes", [2, 3])
def test_a_spread_adapter_shares_its_homes_evenly(num_homes):
    for key in ADAPTERS[:50]:
        own_homes = homes(key, num_homes, list("01234"))
        assert set(own_homes) == set(order(key, idle(5))[:num_homes])
        loads = [0] * 5
        for _ in range(3 * num_homes):
            loads[order(Affinity(key, num_homes), loaded(*loads))[0]] += 1
        assert [loads[index] for index in own_homes] == [3] * num_homes
        assert sum(loads) == 3 * num_homes


def test_a_prefix_chooses_among_the_homes_of_its_adapter():
    own_homes = homes("a", 2, list("01234"))
    others = [index for index in order("a", idle(5)) if index not in own_homes]
    firsts = set()
    for name in PREFIXES[:50]:
        chosen = order(prefix(name, "a", 2), idle(5))
        assert set(chosen[:2]) == set(own_homes)
        # What spills goes on in the adapter's order.
        assert chosen[2:] == others
        firsts.add(chosen[0])
    assert firsts == set(own_homes)


@pytest.mark.parametrize("num_homes", [1, 2, 4])
def test_a_replica_that_comes_takes_one_home_at_most(num_homes):
    for key in ADAPTERS[:50]:
        for num_replicas in range(num_homes, 12):
            ranks = [str(rank) for rank in range(num_replicas + 1)]
            before = homes(key, num_homes, ranks[:-1])
            after = homes(key, num_homes, ranks)
            taken = [new for old, new in zip(before, after, strict=True) if old != new]
            assert taken in ([], [num_replicas])


def test_there_are_no_more_homes_than_replicas():
    assert sorted(homes("a", 9, list("012"))) == [0, 1, 2]
    assert homes("a", 2, []) == []


def test_a_conversation_stays_where_that_does_not_overload_the_replica():
    for name in PREFIXES[:50]:
        first, second, *_ = order(prefix(name), idle(4))
        loads = [3] * 4
        assert order(prefix(name), loaded(*loads))[0] == first
        loads[first] = 20
        assert order(prefix(name), loaded(*loads))[0] == second


def test_base_model_requests_without_a_prefix_go_to_the_least_loaded():
    assert order("", loaded(3, 1, 2)) == [1, 2, 0]
    assert order("", loaded(13, 11, 12)) == [1, 2, 0]


def test_equal_replicas_share_the_base_model():
    counts = Counter(order("", idle(2))[0] for _ in range(200))
    assert min(counts.values()) > 50


def test_an_unusable_replica_is_never_tried_and_does_not_count():
    replicas = [ReplicaLoad("0", 0, is_usable=False), ReplicaLoad("1", 3), ReplicaLoad("2", 100)]
    for affinity in ("", *ADAPTERS[:20], *map(prefix, PREFIXES[:20])):
        assert order(affinity, replicas) == [1, 2]
    assert order("a", [replace(replica, is_usable=False) for replica in replicas]) == []


def test_a_full_replica_keeps_its_adapters_and_gets_no_request():
    for key in ADAPTERS[:50]:
        first, second, third = order(key, idle(3))
        replicas = loaded(6, 6, 6)
        replicas[first] = replace(replicas[first], is_full=True)
        assert order(key, replicas, spill_queue_len=8) == [second, third]
        assert order(Affinity(key, 2), replicas, spill_queue_len=8)[0] == second


def test_a_replica_whose_requests_wait_for_pages_is_beyond_the_bound():
    for key in ADAPTERS[:50]:
        first, second = order(key, idle(2))
        replicas = loaded(2, 2)
        replicas[first] = replace(replicas[first], is_saturated=True)
        assert order(key, replicas) == [second, first]
