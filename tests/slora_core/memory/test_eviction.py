"""The order of eviction: worth, then age; stale entries; room that is made and not more."""

import random

from slora_core.memory.eviction import MAX_COUNTED_USES, CacheEntry, EvictionQueue, GreedyDualClock
from slora_core.memory.page_pool import PageOwner, PagePool


class _Cache:
    """Entries of one page each, in the queue of a full pool."""

    def __init__(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.queue = EvictionQueue(self.pool)
        self.evicted: list[CacheEntry] = []

    def add(self, num_uses: int, cost: float) -> CacheEntry:
        [page_id] = self.pool.allocate(1, PageOwner.KV)
        entry = CacheEntry(num_uses=num_uses)
        self.queue.rate(entry, cost)

        def evict() -> None:
            self.pool.free([page_id])
            self.evicted.append(entry)

        self.queue.add(entry, evict)
        return entry


def test_the_least_worth_goes_first_and_no_more_than_needed() -> None:
    cache = _Cache(4)
    dear, cheap, old, young = (cache.add(*e) for e in ((1, 9.0), (3, 1.0), (1, 4.0), (2, 2.0)))
    cache.queue.make_room(0)
    assert cache.evicted == []
    cache.queue.make_room(2)
    assert cache.evicted == [cheap, old]
    assert young in cache.queue and old not in cache.queue
    cache.queue.make_room(9)
    assert cache.evicted == [cheap, old, young, dear]
    cache.queue.make_room(9)
    assert cache.pool.num_free == 4


def test_what_is_used_again_is_not_evicted_and_counts_anew() -> None:
    cache = _Cache(2)
    first, second = cache.add(1, 1.0), cache.add(1, 1.0)
    cache.queue.discard(first)
    cache.queue.discard(first)
    cache.queue.make_room(2)
    assert cache.evicted == [second]


def test_disuse_ages() -> None:
    clock = GreedyDualClock()
    popular, once = CacheEntry(num_uses=10_000), CacheEntry(num_uses=1)
    clock.rate(popular, 1.0)
    turns = 0
    while once.worth <= popular.worth:
        clock.rate(once, 1.0)
        clock.evicted(once)
        turns += 1
    assert turns == MAX_COUNTED_USES + 1


def test_the_heap_stays_small_where_entries_come_and_go() -> None:
    cache = _Cache(3)
    rng = random.Random(0)
    entry = cache.add(1, 1.0)
    for _ in range(1000):
        cache.queue.discard(entry)
        cache.queue.add(entry, cache.evicted.clear)
        entry.worth = rng.random()
    assert len(cache.queue._heap) < 100
    assert entry in cache.queue
