"""Which packed adapters of the host store to give up when room is needed, and what each is worth.

Pure choice: it frees nothing. `HostStore` owns the entries and does what is chosen here.

Entries are worth what `memory.eviction` says, by the seconds that reloading a byte takes. Of all
runs of neighbours whose removal leaves a long enough hole, the run with the smallest sum of
worth x bytes is chosen: a large cold adapter rather than many small ones here and there.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from app.store.slab import Slab, SlabRange
from slora_core.adapters.page_layout import AdapterLayout
from slora_core.memory.eviction import CacheEntry, GreedyDualClock

# Seconds to bring one adapter back from its packed file, measured on two cores with the file in the
# page cache: open and read the header, then read and check its bytes. Under about 0.3 MB adapters
# cost the same to reload, whatever their size. From their own files it takes twice to five times
# that, which changes the order of few.
_RELOAD_FIXED_S = 0.0003
_RELOAD_BYTES_PER_S = 1.1e9


@dataclass(eq=False)
class StoreEntry(CacheEntry):
    """One adapter in the slab, its leases counted by holder pid."""

    adapter_id: str
    layout: AdapterLayout
    range: SlabRange
    # False while its weights are being packed; nobody leases or evicts it then.
    ready: bool = False
    # Removed: freed with its last lease.
    draining: bool = False
    leases: Counter[int] = field(default_factory=Counter)
    # Who reads it in the store itself.
    num_pins: int = 0

    @property
    def evictable(self) -> bool:
        return self.ready and not self.leases and not self.num_pins

    @property
    def loss(self) -> float:
        """What evicting it costs, against the loss of other entries."""
        return self.worth * self.range.nbytes


class EvictionPolicy:
    """What entries are worth, and the choice of victims."""

    def __init__(self) -> None:
        self._clock = GreedyDualClock()

    def used(self, entry: StoreEntry) -> None:
        """Note one use of an entry: its packing or a lease."""
        nbytes = entry.range.nbytes
        cost_s = _RELOAD_FIXED_S + nbytes / _RELOAD_BYTES_PER_S
        entry.num_uses += 1
        self._clock.rate(entry, cost_s / nbytes)

    def evicted(self, entry: StoreEntry) -> None:
        self._clock.evicted(entry)

    def victims(
        self, slab: Slab, entries: Iterable[StoreEntry], nbytes: int
    ) -> Sequence[StoreEntry]:
        """Entries to evict for a range of `nbytes` that the slab has no room for.

        Empty where that would not make room: too much of it is leased.
        """
        by_extent: dict[str, list[StoreEntry]] = {e.token: [] for e in slab.extents()}
        for entry in entries:
            by_extent[entry.range.token].append(entry)
        choices = [_cheapest_extents(slab, by_extent, nbytes)]
        if not slab.needs_own_extent(nbytes):
            for token, found in by_extent.items():
                extent = slab.extent(token)
                if not slab.is_own_extent(extent):
                    choices.append(_cheapest_run(found, extent.free, nbytes))
        return min(filter(None, choices), key=_total_loss, default=())


def _total_loss(entries: Iterable[StoreEntry]) -> float:
    return sum(entry.loss for entry in entries)


def _cheapest_run(
    entries: Iterable[StoreEntry], free: Sequence[tuple[int, int]], nbytes: int
) -> Sequence[StoreEntry]:
    """Neighbours in one extent that span `nbytes` with the free ranges among them."""
    pieces: list[tuple[int, int, StoreEntry | None]] = [(*span, None) for span in free]
    pieces += [(entry.range.offset, entry.range.end, entry) for entry in entries]
    pieces.sort(key=lambda piece: piece[0])
    losses = [0.0 if entry is None else entry.loss for _, _, entry in pieces]
    best, best_loss = range(0), float("inf")
    first, loss = 0, 0.0
    for last, (_, end, entry) in enumerate(pieces):
        if entry is not None and not entry.evictable:
            first, loss = last + 1, 0.0
            continue
        loss += losses[last]
        while end - pieces[first][1] >= nbytes:
            loss -= losses[first]
            first += 1
        if end - pieces[first][0] >= nbytes and loss < best_loss:
            best, best_loss = range(first, last + 1), loss
    return [entry for i in best if (entry := pieces[i][2]) is not None]


def _cheapest_extents(
    slab: Slab, by_extent: dict[str, list[StoreEntry]], nbytes: int
) -> Sequence[StoreEntry]:
    """Entries of whole extents to clear until a new extent for `nbytes` fits the capacity."""
    missing = slab.total_bytes + slab.extent_bytes_for(nbytes) - slab.capacity_bytes
    clearable = [
        (_total_loss(entries) / slab.extent(token).nbytes, token)
        for token, entries in by_extent.items()
        if all(entry.evictable for entry in entries)
    ]
    victims: list[StoreEntry] = []
    for _, token in sorted(clearable):
        if missing <= 0:
            break
        missing -= slab.extent(token).nbytes
        victims += by_extent[token]
    return victims if missing <= 0 else ()
