"""Packed adapters on the node's disk: one file for each content hash and geometry.

The tier below the slab, and what serves a registered version whose own files were rewritten, moved
or deleted. Owns the reading and writing of files: none is seen half-written, what is read was
checked, and a failing disk costs a warning, never an answer. How much the directory may hold, and
who shares it, is `packed_space`'s. It knows no registry and no slab; `adapter_sources` reads with
it and `keeper` writes. Every method may be called from any thread.
"""

import logging
import os
import threading
import time
import zlib
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from app.registry.state import geometry_key
from app.store.packed_format import (
    FORMAT,
    DamagedFileError,
    PackedFile,
    PackedHeader,
    encode_header,
    write_all,
)
from app.store.packed_space import PARTIAL_PREFIX, SUFFIX, PackedSpace
from slora_core.adapters.page_layout import AdapterGeometry, AdapterLayout

logger = logging.getLogger(__name__)

# Seconds without another write after one that failed.
RETRY_WRITE_S = 60.0


class PackedFiles:
    """The files of one geometry in a `PackedSpace`; with `max_bytes` 0 there are none."""

    def __init__(self, root: str | Path, geometry: AdapterGeometry, max_bytes: int) -> None:
        self._space = PackedSpace(Path(root), max_bytes)
        self._geometry_key = geometry_key(geometry)
        self._page_bytes = geometry.page_bytes
        # Other versions of this program may share the directory.
        self._directory = Path(root) / f"{self._geometry_key}-{FORMAT}"
        self._lock = threading.Lock()
        self._failed_at: float | None = None
        # Since the last file that was written.
        self._has_warned = False

    @property
    def is_on(self) -> bool:
        return self._space.max_bytes > 0

    @property
    def num_files(self) -> int:
        """Of all geometries and stores, as this store last looked."""
        return self._space.num_files

    @property
    def nbytes(self) -> int:
        return self._space.nbytes

    def __contains__(self, adapter_id: str) -> bool:
        return self.is_on and os.path.exists(self._path(adapter_id))

    def start(self) -> None:
        """Sweep what dead writers left, and have other stores see this one."""
        if self.is_on:
            with self._lock, self._failing_softly():
                self._space.open()
                self._space.sweep()

    def close(self) -> None:
        self._space.close()

    @contextmanager
    def open(self, adapter_id: str) -> Iterator[PackedFile | None]:
        """The file of an adapter, None where there is none.

        Raises:
            DamagedFileError: it is damaged, be it that the body finds out; it was deleted.
            OSError: the disk does not give it.
        """
        path = self._path(adapter_id)
        try:
            file = FileIO(path) if self.is_on else None
        except (FileNotFoundError, NotADirectoryError):
            file = None
        if file is None:
            yield None
            return
        with file:
            try:
                yield PackedFile(file, adapter_id, self._geometry_key, self._page_bytes)
            except DamagedFileError:
                with self._lock, self._failing_softly():
                    self._space.remove(path)
                raise

    def has_room(self, nbytes: int, used_at: float, registered: Container[str]) -> bool:
        """Whether a file of about `nbytes` that was used then would be written."""
        if not self._is_writable():
            return False
        with self._lock, self._failing_softly():
            self._space.open()
            return self._space.victims(nbytes, used_at, registered) is not None
        return False

    def write(
        self,
        adapter_id: str,
        layout: AdapterLayout,
        pages: memoryview,
        used_at: float,
        registered: Container[str],
    ) -> bool:
        """Keep an adapter, in place of files that are worth less; false where it was not written.

        `used_at` is when it was used last or loaded, seconds since the epoch; `registered` has
        the adapters that should stay.
        """
        if not self._is_writable():
            return False
        header = PackedHeader(adapter_id, self._geometry_key, layout, len(pages), zlib.crc32(pages))
        start = encode_header(header)
        nbytes = len(start) + len(pages)
        with self._lock, self._failing_softly():
            self._space.open()
            with self._space.writing():
                if adapter_id in self:
                    return True
                victims = self._space.victims(nbytes, used_at, registered)
                if victims is None:
                    return False
                for victim in victims:
                    self._space.remove(victim.path)
                self._publish(adapter_id, (memoryview(start), pages), used_at)
                self._space.added(nbytes)
            self._has_warned = False
            return True
        return False

    def used(self, adapter_id: str, used_at: float) -> None:
        """Note when an adapter was used last."""
        with suppress(OSError):
            os.utime(self._path(adapter_id), (used_at, used_at))

    def remove(self, adapter_id: str) -> None:
        """Delete the file of an adapter that is not registered any more.

        Where other stores live it is left to the limit: they may have registered the same one.
        """
        with self._lock, self._failing_softly():
            if self.is_on and self._space.is_alone():
                self._space.remove(self._path(adapter_id))

    def expect_changes(self) -> None:
        """Look at the directory anew at the next question: others may have deleted files."""
        self._space.expect_changes()

    def _path(self, adapter_id: str) -> Path:
        assert "/" not in adapter_id
        return self._directory / f"{adapter_id}{SUFFIX}"

    def _publish(self, adapter_id: str, pieces: tuple[memoryview, ...], used_at: float) -> None:
        """Write under a temporary name, then rename: a file is seen whole or not at all.

        It is not synced: what a power failure leaves half-written its checksum gives away.
        """
        self._directory.mkdir(mode=0o700, exist_ok=True)
        # Whoever left one of this name is dead, or it would hold the lock.
        partial = self._directory / f"{PARTIAL_PREFIX}{adapter_id}"
        try:
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                for piece in pieces:
                    write_all(fd, piece)
            finally:
                os.close(fd)
            os.utime(partial, (used_at, used_at))
            os.rename(partial, self._path(adapter_id))
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise

    def _is_writable(self) -> bool:
        return self.is_on and (
            self._failed_at is None or time.monotonic() - self._failed_at >= RETRY_WRITE_S
        )

    @contextmanager
    def _failing_softly(self) -> Iterator[None]:
        """Note an error of the disk, with one warning for all that follow, and go on."""
        try:
            yield
        except OSError as error:
            self._failed_at = time.monotonic()
            level = logging.DEBUG if self._has_warned else logging.WARNING
            self._has_warned = True
            logger.log(
                level,
                "packed adapters are not kept in %s for now, so that registered ones are lost "
                "with their own files: %s",
                self._directory,
                error,
            )
