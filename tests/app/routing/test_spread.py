"""Over how many replicas a hot adapter goes, what that does for the cold ones, and that it ends."""

import random
from collections import Counter

import pytest

from app.routing.order import LoadBound, ReplicaLoad, RoutingKeys, order_replicas
from app.routing.spread import HOLD_S, AdapterSpread

SPILL = 8


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def start(spread, adapter_id, num, tag=""):
    for index in range(num):
        spread.started(f"{tag}{adapter_id}-{index}", adapter_id)


def test_an_adapter_of_few_requests_stays_on_one_replica(clock):
    spread = AdapterSpread(SPILL, clock)
    start(spread, "a", SPILL - 1)
    assert spread.width("a", [SPILL - 1, 0, 0, 0]) == 1


def test_an_adapter_takes_as_many_replicas_as_its_share_needs(clock):
    spread = AdapterSpread(SPILL, clock)
    start(spread, "a", 99)
    start(spread, "b", 300)
    queue_lens = [100, 100, 100, 99]
    # Of 100 a replica one adapter may take 75.
    assert spread.width("a", queue_lens) == 2
    assert spread.width("b", queue_lens) == 4
    assert spread.width("c", queue_lens) == 1
    # Alone it takes all.
    alone = AdapterSpread(SPILL, clock)
    start(alone, "a", 99)
    assert alone.width("a", [99, 0, 0]) == 3


def test_several_routers_come_to_the_same_width(clock):
    """Each sees a part of the requests, and what replicas hold of all."""
    spreads = [AdapterSpread(SPILL, clock) for _ in range(4)]
    for index, spread in enumerate(spreads):
        start(spread, "hot", 30, f"{index}-")
        start(spread, "rest", 50, f"{index}-")
    widths = {spread.width("hot", [80, 80, 80, 80]) for spread in spreads}
    assert widths == {3}


def test_it_comes_back_when_the_load_has_been_lower_for_a_while(clock):
    spread = AdapterSpread(SPILL, clock)
    start(spread, "a", 40)
    assert spread.width("a", [20, 20]) == 2
    for index in range(40):
        spread.ended(f"a-{index}")
    spread.ended("unknown")
    clock.now_s += HOLD_S - 1
    assert spread.width("a", [0, 0]) == 2
    # Though asked for meanwhile.
    clock.now_s += 1
    assert spread.width("a", [0, 0]) == 1
    assert not spread._held and not spread._num_running and not spread._adapter_of


def test_fewer_replicas_than_were_held(clock):
    spread = AdapterSpread(SPILL, clock)
    start(spread, "a", 40)
    assert spread.width("a", [10, 10, 10, 10]) == 4
    assert spread.width("a", [20, 20]) == 2


class Cluster:
    """Replicas of equal speed and the routers before them, in steps of one request's time."""

    def __init__(self, num_replicas, num_routers, is_spread, clock):
        self.clock = clock
        self.is_spread = is_spread
        self.queue_lens = [0] * num_replicas
        self.spreads = [AdapterSpread(SPILL, clock) for _ in range(num_routers)]
        # Ends at, router, request, replica.
        self.running = []
        self.served = {}
        self.num_sent = 0

    def send(self, adapter_id, takes_s):
        router = random.randrange(len(self.spreads))
        spread = self.spreads[router]
        width = spread.width(adapter_id, self.queue_lens) if self.is_spread else 1
        loads = [ReplicaLoad(str(rank), load) for rank, load in enumerate(self.queue_lens)]
        keys = RoutingKeys(adapter_id, "", width)
        replica = order_replicas(keys, loads, LoadBound(SPILL, 1.25))[0]
        self.num_sent += 1
        request_id = str(self.num_sent)
        spread.started(request_id, adapter_id)
        self.queue_lens[replica] += 1
        self.running.append((self.clock.now_s + takes_s, router, request_id, replica))
        self.served.setdefault(adapter_id, Counter())[replica] += 1

    def advance(self, seconds):
        self.clock.now_s += seconds
        ended = [entry for entry in self.running if entry[0] <= self.clock.now_s]
        self.running = [entry for entry in self.running if entry[0] > self.clock.now_s]
        for _, router, request_id, replica in ended:
            self.spreads[router].ended(request_id)
            self.queue_lens[replica] -= 1


@pytest.mark.parametrize("num_routers", [1, 4])
def test_cold_adapters_stay_where_they_are_beside_a_hot_one(clock, num_routers):
    random.seed(3)
    moved = {}
    for is_spread in (False, True):
        cluster = Cluster(4, num_routers, is_spread, clock)
        for _ in range(4000):
            name = "hot" if random.random() < 0.4 else f"cold-{random.randrange(200)}"
            cluster.send(name, takes_s=random.uniform(0.5, 1.5))
            cluster.advance(0.005)
        cold = [counts for name, counts in cluster.served.items() if name != "hot"]
        at_home = sum(max(counts.values()) for counts in cold)
        moved[is_spread] = 1 - at_home / sum(counts.total() for counts in cold)
        assert len(cluster.served["hot"]) >= 2
        assert max(cluster.queue_lens) <= 1.25 * (sum(cluster.queue_lens) + 1) / 4 + 1
    assert moved[True] < 0.2 * moved[False]


def test_a_hot_adapter_comes_back_to_its_replica(clock):
    random.seed(4)
    cluster = Cluster(4, 2, True, clock)
    for _ in range(1000):
        cluster.send("hot" if random.random() < 0.5 else "rest", takes_s=1.0)
        cluster.advance(0.005)
    assert len(cluster.served["hot"]) >= 3
    cluster.advance(2 * HOLD_S)
    cluster.served.clear()
    for _ in range(100):
        cluster.send("hot", takes_s=0.1)
        cluster.advance(0.1)
    assert len(cluster.served["hot"]) == 1


@pytest.mark.parametrize("conversation", ["", "c"])
def test_replicas_that_come_and_go_move_only_their_share(conversation):
    """2, 3, 4, 5, 4 and 3 of them, with the ideal of rendezvous hashing."""
    names = [f"adapter-{index}" for index in range(3000)]

    def homes(num_replicas):
        idle = [ReplicaLoad(str(rank), 0) for rank in range(num_replicas)]
        return [
            order_replicas(RoutingKeys(name, conversation), idle, LoadBound())[0] for name in names
        ]

    sizes = [2, 3, 4, 5, 4, 3]
    for before, after in zip(sizes, sizes[1:], strict=False):
        moved = sum(old != new for old, new in zip(homes(before), homes(after), strict=True))
        ideal = len(names) / max(before, after)
        assert moved == pytest.approx(ideal, rel=0.1)
