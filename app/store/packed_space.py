"""The directory of packed adapters that the stores of a node share, and how much it may hold.

Owns its locks, the sweeping of half-written files and the choice of files to give up. It reads and
writes no adapter; `packed_files` does, for the one geometry of its store. Any number of stores
(several applications, an old one beside its successor) may share a directory: each looks at what
is there, one at a time writes, and a file may vanish under any of them.
"""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SUFFIX = ".packed"
PARTIAL_PREFIX = ".partial-"

# Share of the disk that stays free: Ray refuses to spill objects to one that is fuller than 95%.
_KEPT_FREE = 0.05
# struct flock of 64-bit Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")


@dataclass(frozen=True)
class FoundFile:
    """A packed adapter in the directory, of whatever geometry."""

    path: str
    nbytes: int
    # Whole seconds since the epoch, finer than which not every file system remembers; being loaded
    # counts as a use.
    used_at: int

    @property
    def adapter_id(self) -> str:
        return self.path.rpartition("/")[2].removesuffix(SUFFIX)


class PackedSpace:
    """`root`, with at most `max_bytes` of packed adapters of all geometries and stores.

    Calls raise OSError where the directory cannot be made or used.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root = root
        self.max_bytes = max_bytes
        # Of packed adapters, as this store last knew.
        self.num_files = 0
        self.nbytes = 0
        self._is_stale = True
        # Keeps a lock as long as this store lives.
        self._presence: int | None = None

    def open(self) -> None:
        """Make the directory and be seen by other stores; again where somebody removed it."""
        path = self.root / ".stores"
        if self._presence is not None and _is_at(path, self._presence):
            return
        self.close()
        # Weights may be private.
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 1, 0))
        except OSError:
            os.close(fd)
            raise
        self._presence = fd
        self._is_stale = True

    def sweep(self) -> None:
        """Remove what dead writers left."""
        with self.writing():
            for partial in self.root.glob(f"*/{PARTIAL_PREFIX}*"):
                partial.unlink(missing_ok=True)
            self.scan()

    def close(self) -> None:
        if self._presence is not None:
            os.close(self._presence)
            self._presence = None

    def is_alone(self) -> bool:
        """Whether no other living store uses the directory."""
        if self._presence is None:
            return False
        # Asks who would be in the way of an exclusive lock; one's own lock is not.
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        answer = fcntl.fcntl(self._presence, fcntl.F_OFD_GETLK, asked)
        return bool(_FLOCK.unpack(answer)[0] == fcntl.F_UNLCK)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer, so that a half-written file that is seen is a dead writer's."""
        fd = os.open(self.root / ".writer", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # The kernel lets go of it if the process dies.
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def victims(
        self, nbytes: int, used_at: float, registered: Container[str]
    ) -> list[FoundFile] | None:
        """Files to give up for a new one of `nbytes`; None where it is not worth a place.

        First what is not registered goes, then what was used less recently than the new one. What
        other living stores have registered is not known here: beside them all files count as such.
        """
        is_alone = self.is_alone()
        if is_alone and not self._is_stale and max(self._excess(nbytes)) <= 0:
            return []
        found = self.scan()
        over_limit, over_disk = self._excess(nbytes)
        ranked = [
            (not is_alone or file.adapter_id in registered, file.used_at, file) for file in found
        ]
        victims = []
        for is_kept, file_used_at, file in sorted(ranked, key=lambda item: item[:2]):
            # A disk that others have filled is no reason to give up what is registered.
            if over_limit <= 0 and (is_kept or over_disk <= 0):
                break
            if is_kept and file_used_at >= int(used_at):
                return None
            victims.append(file)
            over_limit -= file.nbytes
            over_disk -= file.nbytes
        if over_disk > 0:
            raise OSError(errno.ENOSPC, f"the disk is over {1 - _KEPT_FREE:.0%} full")
        return victims if over_limit <= 0 else None

    def scan(self) -> list[FoundFile]:
        """What is in the directory now."""
        found: list[FoundFile] = []
        for directory in os.scandir(self.root):
            if directory.is_dir(follow_symlinks=False):
                # Others may remove what is listed at any time.
                with contextlib.suppress(FileNotFoundError):
                    found += _packed_files(directory.path)
        self.num_files = len(found)
        self.nbytes = sum(file.nbytes for file in found)
        self._is_stale = False
        return found

    def added(self, nbytes: int) -> None:
        self.num_files += 1
        self.nbytes += nbytes

    def remove(self, path: str | Path) -> None:
        """Delete a file, which may have vanished."""
        with contextlib.suppress(FileNotFoundError):
            nbytes = os.stat(path).st_size
            os.unlink(path)
            self.num_files -= 1
            self.nbytes -= nbytes

    def expect_changes(self) -> None:
        """Have the next question look at the directory, in which others may delete."""
        self._is_stale = True

    def _excess(self, nbytes: int) -> tuple[int, int]:
        """Bytes that must go before `nbytes` more fit the limit, and the disk."""
        disk = os.statvfs(self.root)
        free = int((disk.f_bavail - _KEPT_FREE * disk.f_blocks) * disk.f_frsize)
        return self.nbytes + nbytes - self.max_bytes, nbytes - free


def _is_at(path: Path, fd: int) -> bool:
    """Whether the file that is open is still the one at the path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _packed_files(directory: str) -> Iterator[FoundFile]:
    for entry in os.scandir(directory):
        if entry.name.endswith(SUFFIX):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                yield FoundFile(entry.path, status.st_size, int(status.st_mtime))
