"""Which adapters are registered: names, versions, sources, sizes.

Owns the registrations and their file on disk. It checks an adapter's files by `peft_weights` and
keeps none of their weights. Loading reads files and is slow: callers run it in a thread, any
method in any thread. `app.registry.deployment` serves it.
"""

import itertools
import logging
import os
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from app.registry.inspector import AdapterInspector, Inspection
from app.registry.names_and_paths import check_name, listed
from app.registry.pools import LivingPools
from app.registry.state import (
    AdapterRecord,
    FilesStamp,
    RegistryState,
    StateStore,
    decode_state,
    encode_state,
    files_stamp,
)
from slora_core.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    AdapterPathError,
    AdapterTooLargeError,
    SLoRAError,
)

logger = logging.getLogger(__name__)

_MIB = 1 << 20


@dataclass(frozen=True)
class RegistrySnapshot:
    """Every registration at one revision; two snapshots of one revision are equal."""

    revision: int
    records: Mapping[str, AdapterRecord]
    # Pages of the smallest engine's pool; None until one has told.
    num_pool_pages: int | None


class AdapterRegistry:
    """Registered adapters by name.

    An adapter must leave room for a request in the smallest living engine's pool when it is loaded.
    `reserved_names` cannot be given to an adapter (the base model's name). Of two changes of one
    name the one that was asked later holds, whichever is done first. Every change raises
    `revision` and is written to `store`, from which a new registry takes up where this one ended.
    Only an unload forgets: a registration whose files are gone, or are no adapter any more, stays
    and is `unavailable` until they are back.
    """

    def __init__(
        self,
        inspector: AdapterInspector,
        pools: LivingPools,
        store: StateStore | None = None,
        reserved_names: Collection[str] = (),
    ) -> None:
        self._inspector = inspector
        self._pools = pools
        self._num_pool_pages = pools.smallest
        self._store = store
        self._reserved = frozenset(reserved_names)
        self._lock = threading.RLock()
        # Changes are numbered as they are asked; of each name the latest that took effect.
        self._asked = itertools.count(1)
        self._latest: dict[str, int] = {}
        # Files of unavailable adapters that were tried, and not worth another look.
        self._tried: dict[str, FilesStamp] = {}
        # The clock keeps revisions apart from those of a registry whose state was lost.
        self._state = RegistryState(revision=time.time_ns() // 1_000_000)
        saved = None if store is None else store.read()
        if saved is not None:
            self._restore(decode_state(saved, inspector.geometry))

    @property
    def revision(self) -> int:
        """Rises with every change, across restarts too."""
        return self._state.revision

    def records(self) -> dict[str, AdapterRecord]:
        """Registrations by name, in the order they were first loaded."""
        with self._lock:
            return dict(self._state.records)

    def snapshot(self) -> RegistrySnapshot:
        with self._lock:
            return RegistrySnapshot(
                self._state.revision, dict(self._state.records), self._num_pool_pages
            )

    def report_pool(self, replica_id: str, num_pages: int) -> None:
        """A living engine replica has a pool of `num_pages`; see `LivingPools`."""
        with self._lock:
            self._pools.report(replica_id, num_pages)
            self._look_at_pools()

    def look_again(self) -> None:
        """To be called now and then: which pools live, and which files are back."""
        with self._lock:
            self._look_at_pools()
            away = [record for record in self._state.records.values() if record.unavailable]
        for record in away:
            stamp = files_stamp(record.path)
            if stamp is not None and stamp != self._tried.get(record.name):
                self._tried[record.name] = stamp
                self._try_again(record)

    def scan(self, directory: str | Path) -> list[tuple[str, SLoRAError]]:
        """Load every sub-directory as an adapter named by its folder; returns what failed.

        A failure is logged and the others load. Left alone are hidden folders, names that were
        unloaded since, names registered from elsewhere, and adapters whose files are as they were.

        Raises:
            AdapterPathError: `directory` cannot be listed.
        """
        try:
            folders = sorted(path for path in Path(directory).iterdir() if path.is_dir())
        except OSError as error:
            raise AdapterPathError(
                f"cannot list the adapter directory {directory}: {error.strerror}"
            ) from None
        failures: list[tuple[str, SLoRAError]] = []
        news: list[tuple[str, Path]] = []
        for folder in folders:
            if folder.name.startswith(".") or not self._is_news(folder.name, folder):
                continue
            try:
                check_name(folder.name, self._reserved)
                news.append((folder.name, folder))
            except SLoRAError as error:
                failures.append((folder.name, error))
        for (name, _), found in zip(news, self._inspector.inspect_all(news), strict=True):
            try:
                self._take(name, found, next(self._asked), persist=False)
            except SLoRAError as error:
                failures.append((name, error))
        for name, reason in failures:
            logger.warning("adapter %s in %s is skipped: %s", name, directory, reason)
        with self._lock:
            self._write()
        return failures

    def load(self, name: str, path: str | Path, replace: bool = False) -> AdapterRecord:
        """Register an adapter directory under a name, or a new version of it with `replace`.

        A relative path is looked up under the allowed roots. Whatever fails, an old version stays.
        Returns what the name means then, which is another adapter where that was asked later.

        Raises:
            AdapterNameError: no adapter can have this name.
            AdapterExistsError: the name has another content and `replace` is off.
            AdapterPathError: the path, symbolic links followed, is in no allowed root.
            AdapterTooLargeError: more pages than the pool has beside one KV page.
            InvalidAdapterError: the files.
            AdapterNotFoundError: the name was unloaded meanwhile.
        """
        check_name(name, self._reserved)
        asked = next(self._asked)
        return self._take(name, self._inspector.inspect(name, path), asked, may_replace=replace)

    def unload(self, name: str) -> AdapterRecord:
        """Drop a registration.

        Raises:
            AdapterNotFoundError: no adapter has this name.
        """
        with self._lock:
            record = self._state.records.pop(name, None)
            if record is None:
                raise AdapterNotFoundError(
                    f"no adapter is named {name!r}; {listed(self._state.records)}"
                )
            self._latest[name] = next(self._asked)
            self._state.stamps.pop(name, None)
            self._state.unloaded.add(name)
            self._changed()
            return record

    def _take(
        self,
        name: str,
        found: Inspection | SLoRAError,
        asked: int,
        *,
        may_replace: bool = True,
        persist: bool = True,
    ) -> AdapterRecord:
        """Register what was found, unless a change that was asked later has taken effect."""
        if isinstance(found, SLoRAError):
            raise found
        with self._lock:
            standing = self._state.records.get(name)
            if self._latest.get(name, 0) > asked:
                if standing is None:
                    raise AdapterNotFoundError(
                        f"adapter {name!r} was unloaded while it was loaded; load it again"
                    )
                return standing
            if standing is not None and not may_replace:
                _check_same(standing, found.record)
            self._check_size(name, found.record.num_pages)
            record = self._register(found)
            self._latest[name] = asked
            self._changed(persist)
        for warning in record.warnings:
            logger.warning("adapter %s in %s: %s", name, record.path, warning)
        return record

    def _register(self, found: Inspection) -> AdapterRecord:
        """Give the record its version: a new one, unless the content is what it was."""
        state, record = self._state, found.record
        old = state.records.get(record.name)
        if old is None or old.adapter_id != record.adapter_id:
            last = state.versions.get(record.name, 0 if old is None else old.version)
            state.versions[record.name] = last + 1
        record = replace(record, version=state.versions.setdefault(record.name, 1))
        state.records[record.name] = record
        state.stamps[record.name] = found.stamp
        state.unloaded.discard(record.name)
        self._tried.pop(record.name, None)
        return record

    def _is_news(self, name: str, folder: Path) -> bool:
        with self._lock:
            if name in self._state.unloaded:
                return False
            record = self._state.records.get(name)
            if record is None:
                return True
            directory = os.path.realpath(folder)
            return record.path == directory and self._state.stamps.get(name) != files_stamp(
                directory
            )

    def _check_size(self, name: str, num_pages: int) -> None:
        pool = self._num_pool_pages
        if pool is not None and num_pages >= pool:
            page_mib = self._inspector.geometry.page_bytes / _MIB
            raise AdapterTooLargeError(
                f"adapter {name!r} takes {num_pages} pages ({num_pages * page_mib:.2f} MiB) and a "
                f"request at least one more; the pool has {pool} pages ({pool * page_mib:.2f} MiB)"
            )

    def _look_at_pools(self) -> None:
        smallest = self._pools.smallest
        if smallest != self._num_pool_pages:
            self._num_pool_pages = smallest
            # Nothing to be written: replicas tell it again.
            self._changed(persist=False)

    def _changed(self, persist: bool = True) -> None:
        self._state.revision += 1
        if persist:
            self._write()

    def _write(self) -> None:
        if self._store is None:
            return
        try:
            self._store.write(encode_state(self._state, self._inspector.geometry))
        except OSError as error:
            # The registration itself holds; it will only not outlive this process.
            logger.error("cannot write the registry's state: %s", error)

    def _restore(self, saved: RegistryState | None) -> None:
        """Take over a saved state; files that are not as they were are checked again."""
        if saved is None:
            return
        saved.revision = max(self._state.revision, saved.revision + 1)
        self._state = saved
        news = [record for record in saved.records.values() if not self._is_as_it_was(record)]
        found = self._inspector.inspect_all([(record.name, record.path) for record in news])
        for record, result in zip(news, found, strict=True):
            if isinstance(result, SLoRAError):
                self._set_unavailable(record, result)
            else:
                self._register(result)
        self._write()

    def _is_as_it_was(self, record: AdapterRecord) -> bool:
        stamp = files_stamp(record.path)
        return (
            record.unavailable is None
            and stamp is not None
            and stamp == self._state.stamps.get(record.name)
            and self._is_confined(record)
        )

    def _is_confined(self, record: AdapterRecord) -> bool:
        try:
            return str(self._inspector.confined(record.path)) == record.path
        except SLoRAError:
            return False

    def _set_unavailable(self, record: AdapterRecord, error: SLoRAError) -> None:
        if record.unavailable != str(error):
            logger.warning("adapter %s is registered and its files are not: %s", record.name, error)
        self._tried[record.name] = files_stamp(record.path)
        self._state.records[record.name] = replace(record, unavailable=str(error))

    def _try_again(self, record: AdapterRecord) -> None:
        """Look at files that were away, or no adapter, when they were looked at last."""
        asked = next(self._asked)
        try:
            self._take(record.name, self._inspector.inspect(record.name, record.path), asked)
            logger.info("the files of adapter %s are back", record.name)
        except SLoRAError as error:
            with self._lock:
                if self._state.records.get(record.name) == record:
                    self._set_unavailable(record, error)
                    self._changed()


def _check_same(standing: AdapterRecord, record: AdapterRecord) -> None:
    """Raises AdapterExistsError unless the name means this very content already."""
    if standing.adapter_id != record.adapter_id:
        raise AdapterExistsError(
            f"adapter {record.name!r} is loaded already, version {standing.version} from "
            f"{standing.path}, with another content; ask to replace it or unload it first"
        )
