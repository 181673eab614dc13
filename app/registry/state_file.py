"""A file that holds the registry's state: an SQLite database with a row for each name.

It knows no entries: `state` writes and reads them. SQLite's rollback journal makes a change of some
rows whole or nothing, whenever the process or the machine ends, and works on the network file
systems on which several nodes share such a file.
"""

import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.registry.state import entries_of_old_state

logger = logging.getLogger(__name__)

# How long a write waits for another process that uses the file, such as a registry that is being
# replaced.
_BUSY_TIMEOUT_S = 10.0
_DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


@dataclass(frozen=True)
class StateFile:
    """A file as `StateStore`. It is opened for each call, so that any thread may call."""

    path: Path

    def read(self) -> dict[str, bytes]:
        """Every entry; a file that is damaged is put aside, and nothing is in the new one."""
        if not self.path.exists():
            return {}
        try:
            if self._is_document():
                self._convert()
            with self._open() as database:
                return dict(database.execute("SELECT name, entry FROM entries"))
        except (ValueError, _DamagedError) as error:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            # A journal that is left SQLite deletes when it finds a new file, which is empty.
            os.replace(self.path, aside)
            logger.warning("the registry's state is damaged and put aside as %s: %s", aside, error)
            return {}

    def write(self, entries: Mapping[str, bytes]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._open() as database:
                database.executemany("REPLACE INTO entries VALUES (?, ?)", entries.items())
        except _DamagedError as error:
            raise OSError(str(error)) from error

    def _is_document(self) -> bool:
        """Whether the file is of the format that was one JSON document."""
        with self.path.open("rb") as file:
            return file.read(1) in (b"{", b"[")

    def _convert(self) -> None:
        """Replace the document by a database; whatever happens meanwhile, one of both is there."""
        entries = entries_of_old_state(self.path.read_bytes())
        new = StateFile(self.path.with_name(f"{self.path.name}.new"))
        new.path.unlink(missing_ok=True)
        new.write(entries)
        os.replace(new.path, self.path)
        logger.info("the registry's state in %s is a database now", self.path)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The database within a transaction, which is undone where an error leaves it."""
        try:
            database = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S)
            try:
                with database:
                    database.execute("PRAGMA synchronous = FULL")
                    database.execute(
                        "CREATE TABLE IF NOT EXISTS entries"
                        " (name TEXT PRIMARY KEY, entry BLOB NOT NULL) WITHOUT ROWID"
                    )
                    yield database
            finally:
                database.close()
        except sqlite3.Error as error:
            # Python's own errors have no code.
            is_damaged = getattr(error, "sqlite_errorcode", None) in _DAMAGED
            kind = _DamagedError if is_damaged else OSError
            raise kind(f"the registry's state in {self.path}: {error}") from error


class _DamagedError(Exception):
    """The file is no database, or not a whole one."""
