"""Which adapters are registered: what may be loaded under which name, and what holds.

It checks an adapter's files by `inspector` and keeps none of their weights; what is registered is
`table`'s. Loading reads files and is slow: callers run it in a thread, any method in any thread.
`app.registry.deployment` serves it.
"""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from app.registry.asked_order import AskedOrder
from app.registry.changes import Position, RegistryChanges
from app.registry.inspector import AdapterInspector, Inspection
from app.registry.names_and_paths import check_name, listed
from app.registry.pools import LivingPools, check_fits
from app.registry.retries import Retries
from app.registry.state import AdapterRecord, StateStore
from app.registry.table import RegistrationTable
from app.registry.upkeep import Upkeep
from slora_core.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    AdapterPathError,
    SLoRAError,
)

logger = logging.getLogger(__name__)


class AdapterRegistry:
    """Registered adapters by name.

    An adapter must leave room for a request in the smallest living engine's pool when it is loaded.
    `reserved_names` cannot be given to an adapter (the base model's name). Of two changes of one
    name the one that was asked later holds, whichever is done first. Every change moves `position`
    and is written to `store`, from which a new registry takes up where this one ended.
    Only an unload forgets: a registration whose files are gone, or are no adapter any more, stays
    and is `unavailable` until they are back.
    """

    def __init__(
        self,
        inspector: AdapterInspector,
        pools: LivingPools,
        store: StateStore | None = None,
        reserved_names: Collection[str] = (),
        retries: Retries | None = None,
    ) -> None:
        self._inspector = inspector
        self._pools = pools
        self._reserved = frozenset(reserved_names)
        self._order = AskedOrder()
        self._table = RegistrationTable(inspector.geometry, store)
        self._table.set_num_pool_pages(pools.smallest)
        self._upkeep = Upkeep(self._table, inspector, retries or Retries())
        self._upkeep.check_changed()

    @property
    def position(self) -> Position:
        """Another one after every change, and in every registry."""
        return self._table.position

    def records(self) -> dict[str, AdapterRecord]:
        """Registrations by name."""
        return self._table.records()

    def changes_since(self, position: Position | None = None) -> RegistryChanges:
        """What has changed since, or everything; see `RegistrationTable.changes_since`."""
        return self._table.changes_since(position)

    def report_pool(self, replica_id: str, num_pages: int) -> None:
        """A living engine replica has a pool of `num_pages`; see `LivingPools`."""
        with self._table.lock:
            self._pools.report(replica_id, num_pages)
            self._table.set_num_pool_pages(self._pools.smallest)

    def look_again(self) -> None:
        """To be called now and then: which pools live, which files are back, what is unwritten."""
        with self._table.lock:
            self._table.set_num_pool_pages(self._pools.smallest)
        self._upkeep.check_unavailable()

    def scan(self, directory: str | Path) -> list[tuple[str, SLoRAError]]:
        """Load every sub-directory as an adapter named by its folder; returns what failed.

        A failure is logged and the others load. Left alone are hidden folders, names that were
        unloaded since, names registered from elsewhere, and adapters whose files are as they were.

        Raises:
            AdapterPathError: `directory` cannot be listed.
        """
        return self._upkeep.scan(directory, self._check_loadable)

    def use_directories(self, adapters_dir: str | None, allowed_roots: Sequence[str]) -> None:
        """Serve the adapters of this directory in place of another one's; others may be loaded.

        A name that both have switches to the new content at once. What scans of other directories
        found and this one does not have is forgotten; what somebody loaded stays, unavailable
        where it lies outside of the allowed roots now.

        Raises:
            AdapterPathError: `adapters_dir` cannot be listed; nothing has changed.
        """
        roots_before = self._inspector.roots
        self._inspector.allow(allowed_roots)
        try:
            failures = [] if adapters_dir is None else self.scan(adapters_dir)
        except AdapterPathError:
            self._inspector.allow(roots_before)
            raise
        # As after a load that fails, what the name meant stays.
        failed = {name for name, _ in failures}
        self._upkeep.forget_other_directories(adapters_dir, failed)
        self._upkeep.check_changed()

    def ask(self, name: str) -> int:
        """The place of a `load` or `unload` of this name among all of them, for its `asked`."""
        with self._table.lock:
            return self._order.ask(name)

    def load(
        self, name: str, path: str | Path, replace: bool = False, asked: int | None = None
    ) -> AdapterRecord:
        """Register an adapter directory under a name, or a new version of it with `replace`.

        A relative path is looked up under the allowed roots. Whatever fails, an old version stays.
        Returns what the name means then, which is another adapter where that was asked later.

        Args:
            asked: of `ask`; None is now.

        Raises:
            AdapterNameError: no adapter can have this name.
            AdapterExistsError: the name has another content and `replace` is off.
            AdapterPathError: the path, symbolic links followed, is in no allowed root.
            AdapterTooLargeError: more pages than the pool has beside one KV page.
            InvalidAdapterError: the files.
            AdapterNotFoundError: the name was unloaded meanwhile.
        """
        number = self.ask(name) if asked is None else asked
        try:
            check_name(name, self._reserved)
            found = self._inspector.inspect(name, path)
            with self._table.lock:
                record = self._take(found, number, replace)
        finally:
            self._end(name, number)
        self._table.write()
        for warning in record.warnings:
            logger.warning("adapter %s in %s: %s", name, record.path, warning)
        return record

    def unload(self, name: str, asked: int | None = None) -> AdapterRecord | None:
        """Drop a registration, and loads of the name that were asked before and still go on.

        Returns what the name meant; None where that is only known to such a load, or where the
        name means what was asked later.

        Raises:
            AdapterNotFoundError: no adapter has this name.
        """
        number = self.ask(name) if asked is None else asked
        try:
            with self._table.lock:
                if self._order.is_too_late(name, number):
                    return None
                if self._table.get(name) is None and not self._order.has_older(name, number):
                    raise AdapterNotFoundError(
                        f"no adapter is named {name!r}; {listed(self.records())}"
                    )
                self._order.took_effect(name, number)
                record = self._table.unload(name)
        finally:
            self._end(name, number)
        self._table.write()
        return record

    def _take(self, found: Inspection, number: int, may_replace: bool) -> AdapterRecord:
        """Register what was found, unless a change that was asked later has taken effect."""
        name = found.record.name
        standing = self._table.get(name)
        if self._order.is_too_late(name, number):
            if standing is None:
                raise AdapterNotFoundError(
                    f"adapter {name!r} was unloaded while it was loaded; load it again"
                )
            return standing
        if standing is not None and not may_replace:
            _check_same(standing, found.record)
        self._check_loadable(found.record)
        record = self._table.register(found)
        self._order.took_effect(name, number)
        return record

    def _check_loadable(self, record: AdapterRecord) -> None:
        """Raises a typed error where no adapter can have this name, or this size now."""
        check_name(record.name, self._reserved)
        check_fits(record, self._table.num_pool_pages, self._inspector.geometry.page_bytes)

    def _end(self, name: str, number: int) -> None:
        with self._table.lock:
            self._order.ended(name, number)


def _check_same(standing: AdapterRecord, record: AdapterRecord) -> None:
    """Raises AdapterExistsError unless the name means this very content already."""
    if standing.adapter_id != record.adapter_id:
        raise AdapterExistsError(
            f"adapter {record.name!r} is loaded already, version {standing.version} from "
            f"{standing.path}, with another content; ask to replace it or unload it first"
        )
