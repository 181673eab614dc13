"""What goes first when memory is wanted: of pages, one order for idle adapters and KV prefixes.

GreedyDual-Size-Frequency (Cherkasova, 1998): an entry is worth clock + uses x cost of a unit of
its size, and the clock is the worth of what was last evicted, so that what is not used ages. Knows
neither adapters nor tokens; owners say when an entry is idle and free what it holds.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from slora_core.memory.page_pool import PagePool

# More uses than these do not count, so that what was popular once goes after the memory has been
# filled anew as often.
MAX_COUNTED_USES = 16


@dataclass(eq=False, kw_only=True)
class CacheEntry:
    """What stays in memory when nobody uses it, for whoever may come back."""

    num_uses: int = 0
    worth: float = 0.0


class GreedyDualClock:
    """Makes the worth of entries comparable, whenever each was last used."""

    def __init__(self) -> None:
        self._now = 0.0

    def rate(self, entry: CacheEntry, cost: float) -> None:
        """Set the worth of an entry in use now; `cost` is of bringing a unit of its size back."""
        entry.worth = self._now + min(entry.num_uses, MAX_COUNTED_USES) * cost

    def evicted(self, entry: CacheEntry) -> None:
        self._now = max(self._now, entry.worth)


class EvictionQueue:
    """Idle entries that can be evicted, the least worth first."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._clock = GreedyDualClock()
        # (worth, number, entry, evict); one whose entry has another number or none is stale.
        self._heap: list[tuple[float, int, CacheEntry, Callable[[], None]]] = []
        self._numbers: dict[CacheEntry, int] = {}
        self._next_number = count()

    def __contains__(self, entry: CacheEntry) -> bool:
        return entry in self._numbers

    def rate(self, entry: CacheEntry, cost: float) -> None:
        """Set the worth of an entry whose use ends now; `cost` is that of bringing a page back."""
        self._clock.rate(entry, cost)

    def add(self, entry: CacheEntry, evict: Callable[[], None]) -> None:
        """Have an idle entry wait for its eviction, which is to free its pages."""
        number = next(self._next_number)
        self._numbers[entry] = number
        heapq.heappush(self._heap, (entry.worth, number, entry, evict))

    def discard(self, entry: CacheEntry) -> None:
        """Take an entry out that is used again, or gone; one that is not here is left alone."""
        self._numbers.pop(entry, None)
        if len(self._heap) > 2 * len(self._numbers) + 64:
            self._heap = [item for item in self._heap if self._numbers.get(item[2]) == item[1]]
            heapq.heapify(self._heap)

    def make_room(self, num_pages: int) -> None:
        """Evict until `num_pages` are free or nothing is left to evict."""
        while self._numbers and not self._pool.can_allocate(num_pages):
            _, number, entry, evict = heapq.heappop(self._heap)
            if self._numbers.get(entry) == number:
                self.evicted(entry)
                evict()

    def evicted(self, entry: CacheEntry) -> None:
        """An idle entry goes for want of what it holds: those that stay have aged."""
        self._clock.evicted(entry)
        self.discard(entry)
