"""What the registry does of its own accord: it scans, and looks after files that are not there.

Owns which folders are checked, at the start and now and then. What it finds never beats what
somebody asked for meanwhile, and forgets nothing.
"""

import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

from app.registry.inspector import AdapterInspector, Inspection
from app.registry.retries import Retries
from app.registry.state import AdapterRecord, Entry, files_stamp
from app.registry.table import RegistrationTable
from slora_core.errors import AdapterPathError, SLoRAError
from slora_core.quoting import plain

logger = logging.getLogger(__name__)


class Upkeep:
    def __init__(
        self, table: RegistrationTable, inspector: AdapterInspector, retries: Retries
    ) -> None:
        self._table = table
        self._inspector = inspector
        self._retries = retries

    def check_changed(self) -> None:
        """Check registrations whose files are not as they were; to be called at the start."""
        records = self._table.records().values()
        self._check([record for record in records if not self._is_as_it_was(record)])

    def check_unavailable(self) -> None:
        """Check unavailable adapters that are due, and write what could not be written before."""
        away = [record for record in self._table.records().values() if record.unavailable]
        self._retries.keep_only({record.name for record in away})
        self._check([r for r in away if self._retries.is_due(r.name, files_stamp(r.path))])

    def scan(
        self, directory: str | Path, check_loadable: Callable[[AdapterRecord], None]
    ) -> list[tuple[str, SLoRAError]]:
        """As `AdapterRegistry.scan`; `check_loadable` raises what a load of the record would."""
        real = os.path.realpath(directory)
        news = [folder for folder in _folders(directory) if self._is_news(folder, real)]
        before = [self._table.entry(folder.name) for folder in news]
        found = self._inspector.inspect_all([(folder.name, folder) for folder in news])
        failures: list[tuple[str, SLoRAError]] = []
        for folder, entry, result in zip(news, before, found, strict=True):
            try:
                if isinstance(result, SLoRAError):
                    raise result
                check_loadable(result.record)
                self._register(result, entry, real)
            except SLoRAError as error:
                # A folder's name may be bytes that are no text.
                name = plain(folder.name)
                logger.warning("adapter %s in %s is skipped: %s", name, directory, error)
                failures.append((folder.name, error))
        self._table.write()
        return failures

    def _check(self, records: Collection[AdapterRecord]) -> None:
        before = [self._table.entry(record.name) for record in records]
        found = self._inspector.inspect_all([(record.name, record.path) for record in records])
        for record, entry, result in zip(records, before, found, strict=True):
            if isinstance(result, SLoRAError):
                self._set_unavailable(record, entry, result)
            else:
                # Of whatever size: it is served again when there is a pool for it.
                self._register(result, entry, None if entry is None else entry.scanned_in)
        self._table.write()

    def forget_other_directories(self, directory: str | None, kept: Collection[str]) -> None:
        """Forget what scans of other directories of adapters found and nobody has loaded since."""
        scanned = None if directory is None else os.path.realpath(directory)
        names = [name for name in self._table.scanned_elsewhere(scanned) if name not in kept]
        for name in names:
            self._table.forget(name)
        if names:
            logger.info("%s adapters of another adapters_dir are served no more", len(names))
        self._table.write()

    def _register(self, found: Inspection, before: Entry | None, scanned_in: str | None) -> None:
        """Register what nobody asked for, unless the name's entry is another one than before."""
        name = found.record.name
        with self._table.lock:
            if self._table.entry(name) is not before:
                return
            record = self._table.register(found, scanned_in)
        if before is not None and before.record is not None and before.record.unavailable:
            logger.info("the files of adapter %s are back", name)
        for warning in record.warnings:
            logger.warning("adapter %s in %s: %s", name, record.path, warning)

    def _set_unavailable(
        self, record: AdapterRecord, before: Entry | None, error: SLoRAError
    ) -> None:
        self._retries.failed(record.name, files_stamp(record.path))
        with self._table.lock:
            if self._table.entry(record.name) is not before:
                return
            self._table.set_unavailable(record.name, str(error))
        if record.unavailable != str(error):
            logger.warning("adapter %s is registered and its files are not: %s", record.name, error)

    def _is_as_it_was(self, record: AdapterRecord) -> bool:
        stamp = files_stamp(record.path)
        return (
            record.unavailable is None
            and stamp is not None
            and stamp == self._table.stamp(record.name)
            and self._is_confined(record)
        )

    def _is_confined(self, record: AdapterRecord) -> bool:
        try:
            return str(self._inspector.confined(record.path)) == record.path
        except SLoRAError:
            return False

    def _is_news(self, folder: Path, scanned: str) -> bool:
        """Whether a scan of the directory `scanned` has to look at one of its folders."""
        entry = self._table.entry(folder.name)
        # Also what was unloaded from another directory of adapters.
        if entry is None or entry.scanned_in not in (None, scanned):
            return True
        if entry.record is None:
            return not entry.is_unloaded
        directory = os.path.realpath(folder)
        return entry.record.path == directory and entry.stamp != files_stamp(directory)


def _folders(directory: str | Path) -> list[Path]:
    """Sub-directories that are not hidden, by name.

    Raises:
        AdapterPathError: `directory` cannot be listed.
    """
    try:
        entries = [path for path in Path(directory).iterdir() if path.is_dir()]
    except OSError as error:
        raise AdapterPathError(
            f"cannot list the adapter directory {directory}: {error.strerror}"
        ) from None
    return sorted(path for path in entries if not path.name.startswith("."))
