"""Which adapters are on the device: slots, pages, reference counts, eviction.

Pure bookkeeping, called by the scheduler. It decides what is copied where and knows no tensors;
the copies themselves are `AdapterLoad`s in the step plan, made by the model runner.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from slora_core.memory.eviction import CacheEntry, EvictionQueue
from slora_core.memory.page_pool import PageOwner, PagePool
from slora_core.requests import AdapterLoad

# Of bringing a page back; what KV costs in `memory.prefix_cache` is in this unit.
_PAGE_COST = 1.0


@dataclass(eq=False)
class ResidentAdapter(CacheEntry):
    """An adapter with pages in the pool, in use by `num_users` requests that hold pages."""

    adapter_id: str
    slot: int
    page_ids: list[int]
    num_users: int = 0
    # Set when the adapter was unloaded: its pages are freed with its last user.
    dropped: bool = False


class AdapterResidency:
    """Slots and pages of resident adapters.

    An adapter with users is pinned. One without stays as a cache, until the eviction queue wants
    its pages, or another adapter its slot.
    """

    def __init__(self, pool: PagePool, queue: EvictionQueue, max_slots: int) -> None:
        self._pool = pool
        self._queue = queue
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._pinned: dict[str, ResidentAdapter] = {}
        self._idle: dict[str, ResidentAdapter] = {}
        self.num_pinned_pages = 0
        self.num_loads = 0
        self.num_hits = 0
        self.num_evictions = 0

    def resident_ids(self) -> list[str]:
        return [*self._pinned, *self._idle]

    def page_ids(self) -> Iterator[int]:
        for adapter in (*self._pinned.values(), *self._idle.values()):
            yield from adapter.page_ids

    def is_resident(self, adapter_id: str) -> bool:
        return adapter_id in self._pinned or adapter_id in self._idle

    def is_pinned(self, adapter_id: str) -> bool:
        return adapter_id in self._pinned

    def can_acquire(self, adapter_id: str) -> bool:
        """Whether a slot is there for the adapter; pages are the caller's to count."""
        return self.is_resident(adapter_id) or bool(self._free_slots) or bool(self._idle)

    def acquire(self, adapter_id: str, num_pages: int) -> tuple[int, AdapterLoad | None]:
        """Pin the adapter for one more user.

        The caller made sure that `num_pages` are free or idle. Returns the adapter's slot, and
        the copy that is due before the next step where it was not resident.
        """
        adapter = self._pinned.get(adapter_id) or self._take_idle(adapter_id)
        load = None
        if adapter is None:
            self._queue.make_room(num_pages)
            if not self._free_slots:
                least = min(self._idle.values(), key=lambda adapter: adapter.worth)
                self._queue.evicted(least)
                self._evict(least)
            adapter = ResidentAdapter(
                adapter_id,
                self._free_slots.pop(),
                self._pool.allocate(num_pages, PageOwner.ADAPTER),
            )
            load = AdapterLoad(adapter_id, adapter.slot, adapter.page_ids)
            self.num_loads += 1
        else:
            self.num_hits += 1
        if not adapter.num_users:
            self._pinned[adapter_id] = adapter
            self.num_pinned_pages += len(adapter.page_ids)
        adapter.num_users += 1
        adapter.num_uses += 1
        adapter.dropped = False
        return adapter.slot, load

    def release(self, adapter_id: str) -> None:
        """One user less; with none left the adapter becomes idle, or goes if it was dropped."""
        adapter = self._pinned[adapter_id]
        adapter.num_users -= 1
        if adapter.num_users:
            return
        del self._pinned[adapter_id]
        self.num_pinned_pages -= len(adapter.page_ids)
        if adapter.dropped:
            self._free(adapter)
        else:
            self._idle[adapter_id] = adapter
            self._queue.rate(adapter, _PAGE_COST)
            self._queue.add(adapter, partial(self._evict, adapter))

    def drop(self, adapter_id: str) -> None:
        """Free an unloaded adapter's pages, at once where it is idle, else with its last user."""
        idle = self._take_idle(adapter_id)
        if idle is not None:
            self._free(idle)
        elif adapter_id in self._pinned:
            self._pinned[adapter_id].dropped = True

    def _take_idle(self, adapter_id: str) -> ResidentAdapter | None:
        adapter = self._idle.pop(adapter_id, None)
        if adapter is not None:
            self._queue.discard(adapter)
        return adapter

    def _evict(self, adapter: ResidentAdapter) -> None:
        del self._idle[adapter.adapter_id]
        self._free(adapter)
        self.num_evictions += 1

    def _free(self, adapter: ResidentAdapter) -> None:
        self._pool.free(adapter.page_ids)
        self._free_slots.append(adapter.slot)
