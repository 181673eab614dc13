"""Reading of the node's slab from another process: maps extents, gives views of packed adapters.

Knows no leases: who opens a location holds one. A mapping stays valid when the store process
dies, so adapters that are open then can be used to their end.
"""

import mmap
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass

from slora_core.adapters.page_layout import AdapterGeometry, PackedAdapter
from slora_core.adapters.slab_format import AdapterLocation, ExtentId, header, view_pages
from slora_core.errors import StoreGoneError


class SlabMemory(mmap.mmap):
    """A mapping that tells before it is unmapped, which weak references of it do only after."""

    before_unmap: Callable[[], None] | None = None

    def __del__(self) -> None:
        if self.before_unmap is not None:
            self.before_unmap()


@dataclass(frozen=True)
class _Mapping:
    memory: SlabMemory
    inode: int


class SlabReader:
    """Views of adapters in the slab; each extent is mapped once. Thread-safe."""

    def __init__(
        self,
        geometry: AdapterGeometry,
        on_map: Callable[[SlabMemory], None] | None = None,
    ) -> None:
        """`on_map` is called with the memory of every extent that is mapped."""
        self._geometry = geometry
        self._on_map = on_map
        self._mappings: dict[ExtentId, _Mapping] = {}
        self._lock = threading.Lock()

    def open(self, location: AdapterLocation) -> PackedAdapter:
        """A leased adapter, its pages a view of the slab: for reading only, never written.

        The view may be used until the lease is released.

        Raises:
            StoreGoneError: the store that gave the location has ended; lease again.
        """
        with self._lock:
            mapping = self._mappings.get(location.extent)
            if mapping is None:
                self._forget_stale()
                mapping = _map_extent(location.extent, location.extent_bytes)
                self._mappings[location.extent] = mapping
                if self._on_map is not None:
                    self._on_map(mapping.memory)
        pages = view_pages(self._geometry, location.layout, mapping.memory, location.offset)
        return PackedAdapter(location.adapter_id, location.layout, pages)

    def close(self) -> None:
        """Forget all extents; each is unmapped with the last view of it."""
        with self._lock:
            self._mappings.clear()

    def _forget_stale(self) -> None:
        """Forget extents of dead stores and extents that a living store has closed."""
        for extent, mapping in list(self._mappings.items()):
            try:
                current = os.stat(_proc_path(extent)).st_ino == mapping.inode
            except OSError:
                current = False
            if not current:
                del self._mappings[extent]


def _proc_path(extent: ExtentId) -> str:
    return f"/proc/{extent.pid}/fd/{extent.fd}"


def _map_extent(extent: ExtentId, nbytes: int) -> _Mapping:
    path = _proc_path(extent)
    try:
        # Whatever the descriptor is by now, opening must not wait for it.
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise StoreGoneError(f"cannot open slab {path}: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        start = header(extent.token)
        if (
            not stat.S_ISREG(status.st_mode)
            or status.st_size != nbytes
            or os.pread(fd, len(start), 0) != start
        ):
            raise StoreGoneError(f"{path} is not slab {extent.token} any more")
        # Writable, since CUDA registers nothing else and torch has no read-only tensors.
        return _Mapping(SlabMemory(fd, nbytes), status.st_ino)
    finally:
        os.close(fd)
