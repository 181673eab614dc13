"""The registrations themselves: what each name means, in which version, and what is remembered.

Owns the entries, the history of their changes and their writing, of which a change costs as much
as the names that it is of. Which change is allowed is decided by `registry`.
"""

import logging
import threading
from dataclasses import replace

from app.registry.changes import ChangeHistory, Position, RegistryChanges
from app.registry.inspector import Inspection
from app.registry.state import (
    AdapterRecord,
    Entry,
    FilesStamp,
    StateStore,
    decode_entry,
    encode_entry,
    geometry_key,
)
from slora_core.adapters.page_layout import AdapterGeometry

logger = logging.getLogger(__name__)


class RegistrationTable:
    """Names and their entries. Every method may be called in any thread.

    `lock` is taken by each, and to be held by callers over several that must see no other change
    between them. What has changed is written by `write`, outside of the lock.
    """

    def __init__(self, geometry: AdapterGeometry, store: StateStore | None) -> None:
        self.lock = threading.RLock()
        self._geometry = geometry_key(geometry)
        self._store = store
        self._history = ChangeHistory()
        self._entries: dict[str, Entry] = {}
        self._num_pool_pages: int | None = None
        # Changed since they were written last.
        self._unwritten: set[str] = set()
        self._writing = threading.Lock()
        for name, data in sorted(({} if store is None else store.read()).items()):
            if (entry := decode_entry(name, data, self._geometry)) is not None:
                self._entries[name] = entry

    @property
    def position(self) -> Position:
        """Another one after every change."""
        return self._history.position

    @property
    def num_pool_pages(self) -> int | None:
        """Pages of the smallest engine's pool, as `set_num_pool_pages` was told last."""
        return self._num_pool_pages

    def entry(self, name: str) -> Entry | None:
        """What is remembered of a name, also where it was unloaded."""
        with self.lock:
            return self._entries.get(name)

    def get(self, name: str) -> AdapterRecord | None:
        """What a name means."""
        entry = self.entry(name)
        return None if entry is None else entry.record

    def records(self) -> dict[str, AdapterRecord]:
        """Every registration by its name."""
        with self.lock:
            entries = self._entries.items()
            return {name: entry.record for name, entry in entries if entry.record is not None}

    def scanned_elsewhere(self, directory: str | None) -> list[str]:
        """Names that mean what a scan of another directory of adapters found."""
        with self.lock:
            return [
                name
                for name, entry in self._entries.items()
                if entry.record is not None and entry.scanned_in not in (None, directory)
            ]

    def stamp(self, name: str) -> FilesStamp:
        """Of a record's files as they were when it was loaded, None where that is not known."""
        entry = self.entry(name)
        return None if entry is None else entry.stamp

    def changes_since(self, position: Position | None) -> RegistryChanges:
        """What has changed since; everything for None and where that is not known any more."""
        with self.lock:
            names = self._history.since(position)
            if names is None:
                position, records, removed = None, self.records(), frozenset[str]()
            else:
                now = {name: self.get(name) for name in names}
                records = {name: record for name, record in now.items() if record is not None}
                removed = frozenset(now.keys() - records.keys())
            return RegistryChanges(self.position, position, records, removed, self._num_pool_pages)

    def register(self, found: Inspection, scanned_in: str | None = None) -> AdapterRecord:
        """Give a record its name and version: a new one, unless the content is what it was.

        `scanned_in` is the directory of adapters whose scan found it.
        """
        with self.lock:
            name = found.record.name
            old = self._entries.get(name, Entry(version=0))
            is_same = old.record is not None and old.record.adapter_id == found.record.adapter_id
            version = old.version if is_same else old.version + 1
            record = replace(found.record, version=version)
            self._set(name, Entry(version, record, found.stamp, scanned_in))
            return record

    def set_unavailable(self, name: str, reason: str) -> None:
        """A record's files cannot be used at the moment."""
        with self.lock:
            entry = self._entries[name]
            assert entry.record is not None, "only what is registered has files"
            if entry.record.unavailable != reason:
                record = replace(entry.record, unavailable=reason)
                self._set(name, replace(entry, record=record))

    def unload(self, name: str) -> AdapterRecord | None:
        """Have a name mean nothing, also where it meant nothing before; what it meant."""
        with self.lock:
            old = self._entries.get(name, Entry(version=0))
            self._set(name, Entry(old.version, scanned_in=old.scanned_in, is_unloaded=True))
            return old.record

    def forget(self, name: str) -> None:
        """Have a name mean nothing, until a scan or somebody brings it back."""
        with self.lock:
            self._set(name, Entry(self._entries[name].version))

    def set_num_pool_pages(self, num_pages: int | None) -> None:
        with self.lock:
            if num_pages != self._num_pool_pages:
                self._num_pool_pages = num_pages
                # Nothing to be written: replicas tell it again.
                self._history.note()

    def write(self) -> None:
        """Returns when what had changed is written, by this call or another thread's."""
        if self._store is None:
            return
        with self._writing:
            with self.lock:
                names, self._unwritten = self._unwritten, set()
                entries = {
                    name: encode_entry(self._entries[name], self._geometry) for name in names
                }
            if not entries:
                return
            try:
                self._store.write(entries)
            except OSError as error:
                # The registrations hold; they are written with the next change.
                logger.error("cannot write the registry's state: %s", error)
                with self.lock:
                    self._unwritten |= names

    def _set(self, name: str, entry: Entry) -> None:
        self._entries[name] = entry
        self._history.note(name)
        self._unwritten.add(name)
