"""The node's store of packed adapters: one shared slab, leases, eviction.

Owns which adapters are packed in host memory and for how long. It reads no files and knows no
Ray: `app.store.actor` wraps it in an actor, and `slab_reader` maps what a lease points at.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from app.store.eviction import EvictionPolicy, StoreEntry
from app.store.process_watch import ProcessWatch
from app.store.slab import Slab, SlabRange, align
from app.store.stats import StoreStats
from slora_core.adapters.page_layout import (
    AdapterGeometry,
    AdapterLayout,
    LoraWeights,
    ModuleKey,
    pack_adapter,
)
from slora_core.adapters.slab_format import AdapterLocation, view_pages
from slora_core.errors import AdapterNotFoundError, StoreFullError

_MIB = 1 << 20


class HostStore:
    """Packed adapters of one geometry by content hash, in at most `capacity_bytes`.

    Packing goes straight into the slab, outside the lock, so that different adapters are packed
    at once; every method may be called from any thread.

    Eviction happens only when room is needed, takes no adapter under a lease, and goes by size,
    recency and popularity (`eviction` says how). `punch_holes` off is for readers that pin
    the slab, see `slab.Slab`.
    """

    def __init__(
        self,
        geometry: AdapterGeometry,
        capacity_bytes: int,
        extent_bytes: int = 1 << 30,
        punch_holes: bool = True,
    ) -> None:
        self.geometry = geometry
        self._slab = Slab(capacity_bytes, extent_bytes, punch_holes)
        self._watch = ProcessWatch()
        self._entries: dict[str, StoreEntry] = {}
        self._holders: Counter[int] = Counter()
        self._changed = threading.Condition()
        self._eviction = EvictionPolicy()
        self._num_packs = 0
        self._num_evictions = 0

    def __contains__(self, adapter_id: str) -> bool:
        with self._changed:
            entry = self._entries.get(adapter_id)
            return entry is not None and entry.ready

    def adapter_ids(self) -> list[str]:
        """Adapters that are packed and not draining."""
        with self._changed:
            return [e.adapter_id for e in self._entries.values() if e.ready and not e.draining]

    def put(
        self,
        adapter_id: str,
        layout: AdapterLayout,
        weights: Mapping[ModuleKey, LoraWeights],
        evict: bool = True,
    ) -> bool:
        """Pack an adapter unless it is there; true if this call packed it.

        Raises:
            StoreFullError: as `fill`.
        """

        def pack(memory: memoryview) -> None:
            pages = view_pages(self.geometry, layout, memory)
            pack_adapter(self.geometry, layout, weights, out=pages)

        is_packed = self.fill(adapter_id, layout, pack, evict)
        with self._changed:
            self._num_packs += is_packed
        return is_packed

    def fill(
        self,
        adapter_id: str,
        layout: AdapterLayout,
        write: Callable[[memoryview], None],
        evict: bool = True,
    ) -> bool:
        """Bring an adapter in unless it is there; true if this call did.

        `write` is given its place and writes the pages, every byte of them; nobody sees them
        before it has returned, and where it raises nothing stays. An adapter that is draining is
        taken back. With `evict` off it only takes free room.

        Raises:
            StoreFullError: no room beside what is leased (or, with `evict` off, stored).
        """
        with self._changed:
            entry = self._new_entry(adapter_id, layout, evict)
            if entry is None:
                return False
            memory = self._view(entry)
        try:
            write(memory)
        except BaseException:
            with self._changed:
                self._drop(entry)
            raise
        with self._changed:
            entry.ready = True
            self._eviction.used(entry)
            self._changed.notify_all()
        return True

    @contextmanager
    def pinned(self, adapter_id: str) -> Iterator[tuple[AdapterLayout, memoryview] | None]:
        """Layout and pages of an adapter, which stays for the while; None where it is not here."""
        with self._changed:
            entry = self._entries.get(adapter_id)
            if entry is not None and entry.ready:
                entry.num_pins += 1
            else:
                entry = None
        if entry is None:
            yield None
            return
        try:
            yield entry.layout, self._view(entry)
        finally:
            with self._changed:
                entry.num_pins -= 1
                self._drop_if_drained(entry)
                self._changed.notify_all()

    def lease(self, adapter_id: str, holder_pid: int) -> AdapterLocation:
        """Pin an adapter for a process until it releases it or ends; leases are counted.

        Raises:
            AdapterNotFoundError: the adapter is not packed here.
            ProcessLookupError: no process has this pid.
        """
        with self._changed:
            if holder_pid in self._watch.dead():
                # The pid was given to another process before anybody asked `dead_holders`.
                self._drop_holder(holder_pid)
            entry = self._entries.get(adapter_id)
            if entry is None or not entry.ready:
                raise AdapterNotFoundError(f"adapter {adapter_id} is not in the host store")
            self._watch.add(holder_pid)
            entry.leases[holder_pid] += 1
            self._holders[holder_pid] += 1
            self._eviction.used(entry)
            extent = self._slab.extent(entry.range.token)
            return AdapterLocation(
                adapter_id, entry.layout, extent.id, extent.nbytes, entry.range.offset
            )

    def release(self, adapter_id: str, holder_pid: int, token: str | None = None) -> bool:
        """End one lease; false if the process holds none on this adapter.

        `token` of the extent that the lease was for keeps a lease that a store before this one
        gave from ending one of this store's.
        """
        with self._changed:
            entry = self._entries.get(adapter_id)
            if entry is None or not entry.leases[holder_pid]:
                return False
            if token is not None and token != entry.range.token:
                return False
            self._end_leases(entry, holder_pid, 1)
            return True

    def dead_holders(self) -> list[int]:
        """Holders whose process has ended; `drop_holder` each. See `holder_fileno`."""
        with self._changed:
            return self._watch.dead()

    def holder_fileno(self) -> int:
        """A descriptor that is readable when `dead_holders` has something to say."""
        return self._watch.fileno()

    def drop_holder(self, pid: int) -> int:
        """End every lease of a process; returns how many there were."""
        with self._changed:
            return self._drop_holder(pid)

    def remove(self, adapter_id: str) -> bool:
        """Free an adapter, with its last lease if it has any; false if it is not packed here."""
        with self._changed:
            entry = self._entries.get(adapter_id)
            if entry is None or not entry.ready:
                return False
            entry.draining = True
            self._drop_if_drained(entry)
            return True

    def stats(self) -> StoreStats:
        with self._changed:
            entries = self._entries.values()
            return StoreStats(
                capacity_bytes=self._slab.capacity_bytes,
                extent_bytes=self._slab.total_bytes,
                used_bytes=sum(e.range.nbytes for e in entries),
                leased_bytes=sum(e.range.nbytes for e in entries if e.leases),
                num_adapters=len(entries),
                num_leases=self._holders.total(),
                num_holders=len(self._holders),
                num_draining=sum(e.draining for e in entries),
                num_packs=self._num_packs,
                num_evictions=self._num_evictions,
            )

    def check_integrity(self) -> None:
        """Assert that ranges tile the slab, leases add up and nothing drained stays."""
        with self._changed:
            self._slab.check_integrity([entry.range for entry in self._entries.values()])
            holders: Counter[int] = Counter()
            for entry in self._entries.values():
                assert all(count > 0 for count in entry.leases.values())
                is_held = entry.leases or entry.num_pins
                assert is_held or not (entry.draining and entry.ready), "drained but kept"
                holders.update(entry.leases)
            assert holders == self._holders

    def close(self) -> None:
        """Forget everything and give the memory back; views that readers hold stay valid."""
        with self._changed:
            self._entries.clear()
            self._holders.clear()
            self._slab.close()
            self._watch.close()

    def _new_entry(self, adapter_id: str, layout: AdapterLayout, evict: bool) -> StoreEntry | None:
        """An entry to be filled; None where the adapter is there, be it draining until now."""
        while True:
            # Another thread that brings the same adapter either finishes or fails.
            self._changed.wait_for(
                lambda: (entry := self._entries.get(adapter_id)) is None or entry.ready
            )
            found = self._entries.get(adapter_id)
            if found is not None:
                found.draining = False
                return None
            try:
                entry = StoreEntry(adapter_id, layout, self._allocate(layout.num_pages, evict))
            except StoreFullError:
                # Pins last for moments, and what has one may be all that could go.
                if not evict or not any(e.num_pins for e in self._entries.values()):
                    raise
                self._changed.wait()
            else:
                self._entries[adapter_id] = entry
                return entry

    def _allocate(self, num_pages: int, evict: bool) -> SlabRange:
        nbytes = align(num_pages * self.geometry.page_bytes)
        if nbytes > self._slab.max_range_bytes:
            raise StoreFullError(
                f"the adapter takes {nbytes / _MIB:.1f} MiB of host memory and the store holds "
                f"{self._slab.max_range_bytes / _MIB:.1f} MiB in all"
            )
        taken = self._slab.allocate(nbytes) or (self._evict_for(nbytes) if evict else None)
        if taken is None:
            used = sum(e.range.nbytes for e in self._entries.values())
            kept = sum(e.range.nbytes for e in self._entries.values() if not e.evictable)
            raise StoreFullError(
                f"the adapter takes {nbytes / _MIB:.1f} MiB of host memory; of the store's "
                f"{self._slab.capacity_bytes / _MIB:.1f} MiB, {used / _MIB:.1f} MiB are in use "
                f"and {kept / _MIB:.1f} MiB of that under leases"
            )
        return taken

    def _evict_for(self, nbytes: int) -> SlabRange | None:
        """A range in place of the entries whose loss is smallest; None where none can be made."""
        for entry in self._eviction.victims(self._slab, self._entries.values(), nbytes):
            self._eviction.evicted(entry)
            self._num_evictions += 1
            self._drop(entry)
        return self._slab.allocate(nbytes)

    def _view(self, entry: StoreEntry) -> memoryview:
        """The memory of an entry's pages."""
        memory = memoryview(self._slab.extent(entry.range.token).memory)
        offset = entry.range.offset
        return memory[offset : offset + entry.layout.num_pages * self.geometry.page_bytes]

    def _drop_holder(self, pid: int) -> int:
        ended = 0
        for entry in list(self._entries.values()):
            if entry.leases[pid]:
                ended += entry.leases[pid]
                self._end_leases(entry, pid, entry.leases[pid])
        self._watch.remove(pid)
        return ended

    def _end_leases(self, entry: StoreEntry, pid: int, count: int) -> None:
        for counter in (entry.leases, self._holders):
            counter[pid] -= count
            if not counter[pid]:
                del counter[pid]
        if pid not in self._holders:
            self._watch.remove(pid)
        self._drop_if_drained(entry)

    def _drop_if_drained(self, entry: StoreEntry) -> None:
        if entry.draining and not entry.leases and not entry.num_pins:
            self._drop(entry)

    def _drop(self, entry: StoreEntry) -> None:
        del self._entries[entry.adapter_id]
        self._slab.free(entry.range)
        self._changed.notify_all()
