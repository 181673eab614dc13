"""Shared memory of the host store: `memfd` extents and first-fit, page-aligned allocation.

It knows nothing of leases or processes. A memfd has no name in any file system: the kernel
frees it with the last descriptor and mapping, so nothing remains whoever is killed, and the size
of /dev/shm does not matter. Other processes of the node map it through /proc (`slab_reader`).
The first memory page of an extent is its header (`slab_format`).
"""

import bisect
import mmap
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from slora_core.adapters.slab_format import HEADER_BYTES, ExtentId, header


@dataclass(frozen=True)
class SlabRange:
    """Bytes [offset, offset + nbytes) of an extent."""

    token: str
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


def align(nbytes: int) -> int:
    """`nbytes` rounded up to whole memory pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


class Extent:
    """One memfd, mapped, with the list of its free ranges; everything in whole memory pages."""

    def __init__(self, nbytes: int) -> None:
        assert nbytes % mmap.PAGESIZE == 0 and nbytes > HEADER_BYTES
        self.token = secrets.token_hex(16)
        self.nbytes = nbytes
        self.fd = os.memfd_create("slora-slab", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, nbytes)
            self.memory = mmap.mmap(self.fd, nbytes)
        except OSError:
            os.close(self.fd)
            raise
        start = header(self.token)
        self.memory[: len(start)] = start
        # Sorted (offset, end) of free ranges, never adjacent.
        self.free: list[tuple[int, int]] = [(HEADER_BYTES, nbytes)]

    @property
    def id(self) -> ExtentId:
        return ExtentId(os.getpid(), self.fd, self.token)

    @property
    def is_empty(self) -> bool:
        return self.free == [(HEADER_BYTES, self.nbytes)]

    def take(self, nbytes: int) -> SlabRange | None:
        """First free range that is long enough, cut to `nbytes`."""
        for index, (offset, end) in enumerate(self.free):
            if end - offset >= nbytes:
                self.free[index : index + 1] = (
                    [(offset + nbytes, end)] if end - offset > nbytes else []
                )
                return SlabRange(self.token, offset, nbytes)
        return None

    def give_back(self, taken: SlabRange, punch: bool) -> None:
        """Return a range, merged with free neighbours; `punch` returns its memory too."""
        offset, end = taken.offset, taken.end
        index = bisect.bisect(self.free, (offset, end))
        first = last = index
        if index > 0 and self.free[index - 1][1] == offset:
            first, offset = index - 1, self.free[index - 1][0]
        if index < len(self.free) and self.free[index][0] == end:
            last, end = index + 1, self.free[index][1]
        self.free[first:last] = [(offset, end)]
        if punch:
            self.memory.madvise(mmap.MADV_REMOVE, taken.offset, taken.nbytes)

    def close(self) -> None:
        """Let go of the descriptor; the mapping goes with the last tensor that views it."""
        # Not memory.close(): torch.frombuffer keeps no export, so a live view would then fault.
        del self.memory
        os.close(self.fd)


class Slab:
    """Extents up to `capacity_bytes` in all, grown one at a time.

    A range longer than an extent of `extent_bytes` holds gets an extent of its own, which is
    closed when the range is freed. With `punch_holes` a freed range's memory goes back to the
    system at once. That must be off where readers pin the mapping (cudaHostRegister): pinned
    pages that are punched out of the file stay behind the device's back while new writes go to
    new pages. Memory then goes back with whole extents only.
    """

    def __init__(self, capacity_bytes: int, extent_bytes: int, punch_holes: bool = True) -> None:
        self.capacity_bytes = capacity_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        self.extent_bytes = align(extent_bytes)
        self.punch_holes = punch_holes
        if min(self.capacity_bytes, self.extent_bytes) <= HEADER_BYTES:
            raise ValueError(
                f"capacity_bytes is {capacity_bytes} and extent_bytes is {extent_bytes}; each "
                f"must be at least {2 * HEADER_BYTES}"
            )
        self._extents: dict[str, Extent] = {}

    @property
    def total_bytes(self) -> int:
        """Bytes of all extents, headers included."""
        return sum(extent.nbytes for extent in self._extents.values())

    @property
    def max_range_bytes(self) -> int:
        """Longest range that an otherwise empty slab could give."""
        return self.capacity_bytes - HEADER_BYTES

    def extents(self) -> Iterator[Extent]:
        return iter(self._extents.values())

    def extent(self, token: str) -> Extent:
        return self._extents[token]

    def needs_own_extent(self, nbytes: int) -> bool:
        return nbytes > self.extent_bytes - HEADER_BYTES

    def is_own_extent(self, extent: Extent) -> bool:
        """Whether the extent was made for one range that no ordinary one could hold."""
        return extent.nbytes > self.extent_bytes

    def extent_bytes_for(self, nbytes: int) -> int:
        """Bytes of capacity that a range needs where no extent has room for it."""
        return align(nbytes) + HEADER_BYTES

    def allocate(self, nbytes: int) -> SlabRange | None:
        """A range of at least `nbytes`, growing by an extent if need be; None if full."""
        nbytes = align(nbytes)
        if not self.needs_own_extent(nbytes):
            for extent in self._extents.values():
                taken = None if self.is_own_extent(extent) else extent.take(nbytes)
                if taken is not None:
                    return taken
        grown = self._grow(nbytes)
        return None if grown is None else grown.take(nbytes)

    def free(self, taken: SlabRange) -> None:
        extent = self._extents[taken.token]
        extent.give_back(taken, self.punch_holes)
        if extent.is_empty and self.is_own_extent(extent):
            self._close(extent)

    def close(self) -> None:
        for extent in list(self._extents.values()):
            self._close(extent)

    def _grow(self, nbytes: int) -> Extent | None:
        """A new extent that holds `nbytes`, in place of empty ones where capacity is short."""
        needed = self.extent_bytes_for(nbytes)
        empty = [extent for extent in self._extents.values() if extent.is_empty]
        room = self.capacity_bytes - self.total_bytes
        if needed > room + sum(extent.nbytes for extent in empty):
            return None
        while needed > room:
            extent = empty.pop()
            room += extent.nbytes
            self._close(extent)
        ordinary = 0 if self.needs_own_extent(nbytes) else min(self.extent_bytes, room)
        extent = Extent(max(needed, ordinary))
        self._extents[extent.token] = extent
        return extent

    def _close(self, extent: Extent) -> None:
        del self._extents[extent.token]
        extent.close()

    def check_integrity(self, taken: list[SlabRange]) -> None:
        """Assert that `taken` and the free ranges tile every extent exactly once."""
        assert self.total_bytes <= self.capacity_bytes
        spans: dict[str, list[tuple[int, int]]] = {token: [] for token in self._extents}
        for piece in taken:
            spans[piece.token].append((piece.offset, piece.end))
        for token, extent in self._extents.items():
            assert not (self.is_own_extent(extent) and extent.is_empty), "an own extent is idle"
            for (_, end), (offset, _) in zip(extent.free, extent.free[1:], strict=False):
                assert end < offset, "free ranges touch or overlap"
            at = HEADER_BYTES
            for offset, end in sorted(spans[token] + extent.free):
                assert offset == at and end > offset, f"extent {token} is not tiled at {at}"
                at = end
            assert at == extent.nbytes
            start = header(token)
            assert extent.memory[: len(start)] == start, "an extent's header was overwritten"
