"""Which adapters are registered: names, versions, sources, sizes.

Owns the registrations and their file on disk. It checks an adapter's files by `peft_weights` and
keeps none of their weights. Loading reads files and is slow: callers run it in a thread, any
method in any thread. `app.registry.deployment` serves it.
"""

import logging
import os
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from app.registry.names_and_paths import check_name, confined_path, listed
from app.registry.state import (
    AdapterRecord,
    FilesStamp,
    RegistryState,
    StateStore,
    decode_state,
    encode_state,
    files_stamp,
)
from slora_core.adapters.adapter_rules import AdapterRules
from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.adapters.peft_weights import inspect_peft_adapter
from slora_core.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    AdapterPathError,
    AdapterTooLargeError,
    SLoRAError,
)
from slora_core.text.adapter_text import AdapterText
from slora_core.text.folder_text import BaseText, read_adapter_text

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

    An adapter must leave room for a request in an engine's pool of `num_pool_pages`; None is a
    pool that engines size when they start and tell by `report_pool`, and is not remembered.
    `allowed_roots` are the directories that adapters may come from. `reserved_names` cannot be
    given to an adapter (the base model's name); `rules` and `base_text` are for its files. Every
    change raises `revision` and is written to `store`, from which a new registry takes up where
    this one ended; registrations whose files have changed since are checked again, and dropped
    with a warning if that fails or if the pool is too small for them now.
    """

    def __init__(
        self,
        geometry: AdapterGeometry,
        num_pool_pages: int | None,
        allowed_roots: Iterable[str | Path],
        store: StateStore | None = None,
        reserved_names: Collection[str] = (),
        rules: AdapterRules | None = None,
        base_text: BaseText | None = None,
    ) -> None:
        self._rules = rules
        self._base_text = base_text
        self._geometry = geometry
        self._num_pool_pages = num_pool_pages
        self._roots = [Path(os.path.realpath(root)) for root in allowed_roots]
        self._store = store
        self._reserved = frozenset(reserved_names)
        self._lock = threading.RLock()
        # The clock keeps revisions apart from those of a registry whose state was lost.
        self._state = RegistryState(revision=time.time_ns() // 1_000_000)
        saved = None if store is None else store.read()
        if saved is not None:
            self._restore(decode_state(saved, geometry))

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

    def report_pool(self, num_pages: int) -> None:
        """An engine has a pool of `num_pages`; adapters too large for it are dropped."""
        with self._lock:
            if self._num_pool_pages is not None and self._num_pool_pages <= num_pages:
                return
            self._num_pool_pages = num_pages
            for record in self.records().values():
                try:
                    self._check_size(record.name, record.num_pages)
                except AdapterTooLargeError as error:
                    self._forget(record.name, error)
            self._changed()

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
        for folder in folders:
            name = folder.name
            if name.startswith(".") or not self._is_news(name, folder):
                continue
            try:
                self._load(name, folder, replace_old=True, persist=False)
            except SLoRAError as error:
                logger.warning("adapter %s in %s is skipped: %s", name, directory, error)
                failures.append((name, error))
        with self._lock:
            self._write()
        return failures

    def load(self, name: str, path: str | Path, replace: bool = False) -> AdapterRecord:
        """Register an adapter directory under a name, or a new version of it with `replace`.

        A relative path is looked up under the allowed roots. Whatever fails, an old version stays.

        Raises:
            AdapterNameError: no adapter can have this name.
            AdapterExistsError: the name is taken and `replace` is off.
            AdapterPathError: the path, symbolic links followed, is in no allowed root.
            AdapterTooLargeError: more pages than the pool has beside one KV page.
            InvalidAdapterError: the files.
        """
        return self._load(name, path, replace, persist=True)

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
            self._state.stamps.pop(name, None)
            self._state.unloaded.add(name)
            self._changed()
            return record

    def _load(self, name: str, path: str | Path, replace_old: bool, persist: bool) -> AdapterRecord:
        check_name(name, self._reserved)
        if not replace_old:
            self._check_free(name)
        directory = confined_path(path, self._roots)
        stamp = files_stamp(directory)
        record = self._inspect(name, directory)
        with self._lock:
            # Somebody may have taken the name meanwhile.
            if not replace_old:
                self._check_free(name)
            record = self._register(record, stamp)
            self._changed(persist)
        for warning in record.warnings:
            logger.warning("adapter %s in %s: %s", name, directory, warning)
        return record

    def _inspect(self, name: str, directory: Path) -> AdapterRecord:
        """Check an adapter's files; the version is given by `_register`."""
        summary = inspect_peft_adapter(directory, self._geometry, self._rules)
        self._check_size(name, summary.num_pages)
        text = AdapterText()
        warnings: tuple[str, ...] = ()
        if self._base_text is not None:
            text, warnings = read_adapter_text(directory, self._base_text)
        return AdapterRecord(
            name=name,
            adapter_id=summary.adapter_id,
            version=0,
            path=str(directory),
            max_rank=summary.max_rank,
            num_pages=summary.num_pages,
            nbytes=summary.nbytes,
            loaded_at=time.time(),
            warnings=(*summary.warnings, *warnings),
            text=text,
        )

    def _register(self, record: AdapterRecord, stamp: FilesStamp) -> AdapterRecord:
        """Give the record its version: a new one, unless the content is what it was."""
        state = self._state
        old = state.records.get(record.name)
        if old is None or old.adapter_id != record.adapter_id:
            last = state.versions.get(record.name, 0 if old is None else old.version)
            state.versions[record.name] = last + 1
        record = replace(record, version=state.versions.setdefault(record.name, 1))
        state.records[record.name] = record
        state.stamps[record.name] = stamp
        state.unloaded.discard(record.name)
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

    def _check_free(self, name: str) -> None:
        old = self._state.records.get(name)
        if old is not None:
            raise AdapterExistsError(
                f"adapter {name!r} is loaded already, version {old.version} from {old.path}; "
                "ask to replace it or unload it first"
            )

    def _check_size(self, name: str, num_pages: int) -> None:
        pool = self._num_pool_pages
        if pool is not None and num_pages >= pool:
            page_mib = self._geometry.page_bytes / _MIB
            raise AdapterTooLargeError(
                f"adapter {name!r} takes {num_pages} pages ({num_pages * page_mib:.2f} MiB) and a "
                f"request at least one more; the pool has {pool} pages ({pool * page_mib:.2f} MiB)"
            )

    def _changed(self, persist: bool = True) -> None:
        self._state.revision += 1
        if persist:
            self._write()

    def _write(self) -> None:
        if self._store is None:
            return
        try:
            self._store.write(encode_state(self._state, self._geometry))
        except OSError as error:
            # The registration itself holds; it will only not outlive this process.
            logger.error("cannot write the registry's state: %s", error)

    def _restore(self, saved: RegistryState | None) -> None:
        """Take over a saved state; what changed meanwhile is checked again or dropped."""
        if saved is None:
            return
        saved.revision = max(self._state.revision, saved.revision + 1)
        self._state = saved
        for record in list(saved.records.values()):
            try:
                directory = confined_path(record.path, self._roots)
                stamp = files_stamp(directory)
                if stamp is None or stamp != saved.stamps.get(record.name):
                    self._register(self._inspect(record.name, directory), stamp)
                else:
                    self._check_size(record.name, record.num_pages)
            except SLoRAError as error:
                self._forget(record.name, error)
        self._write()

    def _forget(self, name: str, error: SLoRAError) -> None:
        logger.warning("adapter %s is not registered any more: %s", name, error)
        del self._state.records[name]
