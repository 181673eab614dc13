"""Random loads, unloads, changes of files, pools and restarts, against a model."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from app.registry import upkeep
from app.registry.inspector import AdapterInspector, Inspection
from app.registry.pools import FORGET_AFTER_S, LivingPools
from app.registry.registrations import Registrations
from app.registry.registry import AdapterRegistry
from app.registry.retries import MAX_PAUSE_S, Retries
from slora_core.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    InvalidAdapterError,
)
from tests.app.fakes import make_record
from tests.factories import uniform_geometry

GEOMETRY = uniform_geometry(1, 64, {"q_proj": (64, 64)})
NAMES = st.sampled_from(["a", "b"])
PATHS = st.sampled_from(["/p", "/q"])
# Content of a folder: its adapter's pages; None where there is no adapter.
CONTENTS = st.sampled_from([None, 2, 3, 8])


class Disk:
    """Folders by path, each with its content and the number of its last change."""

    def __init__(self) -> None:
        self.contents: dict[str, int | None] = {"/p": 2, "/q": 8}
        self.stamps = dict.fromkeys(self.contents, (0,))

    def write(self, path: str, content: int | None) -> None:
        self.contents[path] = content
        self.stamps[path] = (self.stamps[path][0] + 1,)


class DiskInspector(AdapterInspector):
    def __init__(self, disk: Disk) -> None:
        super().__init__(GEOMETRY, ["/"])
        self._disk = disk

    def inspect(self, name, path):
        pages = self._disk.contents[str(path)]
        if pages is None:
            raise InvalidAdapterError(f"{path} is no adapter")
        record = make_record(name, adapter_id=f"id-{pages}", num_pages=pages, path=str(path))
        return Inspection(record, self._disk.stamps[str(path)], 0.0)


@dataclass
class Name:
    """What the model knows of a name."""

    version: int = 0
    content: int | None = None
    path: str | None = None
    # Of the files when they were looked at last.
    stamp: tuple[int, ...] | None = None
    is_available: bool = True


@dataclass
class Model:
    names: dict[str, Name] = field(default_factory=dict)
    pools: dict[str, tuple[int, float]] = field(default_factory=dict)

    def smallest(self, now: float) -> int | None:
        pages = [pages for pages, at in self.pools.values() if now - at < FORGET_AFTER_S]
        return min(pages, default=None)


class RegistryMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.disk = Disk()
        self.patch.setattr(upkeep, "files_stamp", lambda path: self.disk.stamps[str(path)])
        self.now = 0.0
        self.saved: dict[str, bytes] = {}
        self.is_disk_full = False
        self.model = Model()
        self.known_pool: int | None = None
        self.copy = Registrations()
        self.open()

    def teardown(self) -> None:
        self.patch.undo()

    def open(self) -> None:
        machine = self

        class Store:
            def read(self):
                return dict(machine.saved)

            def write(self, entries):
                if machine.is_disk_full:
                    raise OSError("no space left")
                machine.saved.update(entries)

        self.registry = AdapterRegistry(
            DiskInspector(self.disk),
            LivingPools(None, lambda: self.now),
            Store(),
            retries=Retries(lambda: self.now),
        )

    @rule(path=PATHS, content=CONTENTS)
    def files_change(self, path, content) -> None:
        self.disk.write(path, content)

    @rule(name=NAMES, path=PATHS, replace=st.booleans())
    def load(self, name, path, replace) -> None:
        content = self.disk.contents[path]
        known = self.model.names.get(name, Name())
        pool = self.known_pool
        expected = None
        if content is None:
            expected = InvalidAdapterError
        elif known.content not in (None, content) and not replace:
            expected = AdapterExistsError
        elif pool is not None and content >= pool:
            expected = AdapterTooLargeError
        if expected is not None:
            with pytest.raises(expected):
                self.registry.load(name, path, replace)
            return
        record = self.registry.load(name, path, replace)
        self.learn(name, path)
        assert (record.version, record.path) == (self.model.names[name].version, path)

    @rule(name=NAMES)
    def unload(self, name) -> None:
        known = self.model.names.get(name, Name())
        if known.content is None:
            with pytest.raises(AdapterNotFoundError):
                self.registry.unload(name)
        else:
            assert self.registry.unload(name).version == known.version
            known.content = known.path = None

    @rule(replica=st.sampled_from("rs"), pages=st.sampled_from([4, 100]))
    def report_pool(self, replica, pages) -> None:
        self.registry.report_pool(replica, pages)
        self.model.pools[replica] = (pages, self.now)
        self.known_pool = self.model.smallest(self.now)

    @rule(seconds=st.sampled_from([0, FORGET_AFTER_S / 2, FORGET_AFTER_S, MAX_PAUSE_S]))
    def look_again_after_a_while(self, seconds) -> None:
        self.now += seconds
        self.registry.look_again()
        self.known_pool = self.model.smallest(self.now)
        for name, known in self.model.names.items():
            # Files that are an adapter now have changed since, and are looked at at once.
            if known.content is not None and not known.is_available:
                self.learn(name, known.path)

    @rule(is_full=st.booleans())
    def disk_fills(self, is_full) -> None:
        self.is_disk_full = is_full
        if not is_full:
            # As with the next change, or look.
            self.registry._table.write()

    @rule()
    def restart(self) -> None:
        # What was not written would be lost with the process.
        self.disk_fills(False)
        self.open()
        self.model.pools.clear()
        self.known_pool = None
        for name, known in self.model.names.items():
            if known.content is not None:
                is_same = known.is_available and known.stamp == self.disk.stamps[known.path]
                if not is_same:
                    self.learn(name, known.path)

    def learn(self, name: str, path: str) -> None:
        """The files at a path were looked at for a name."""
        known = self.model.names.setdefault(name, Name())
        content = self.disk.contents[path]
        known.is_available = content is not None
        if content is not None:
            known.version += known.content != content
            known.content = content
            known.path, known.stamp = path, self.disk.stamps[path]

    @invariant()
    def the_registry_is_as_the_model(self) -> None:
        expected = {
            name: (known.version, f"id-{known.content}", known.path, known.is_available)
            for name, known in self.model.names.items()
            if known.content is not None
        }
        actual = {
            name: (r.version, r.adapter_id, r.path, r.unavailable is None)
            for name, r in self.registry.records().items()
        }
        assert actual == expected

    @invariant()
    def a_follower_knows_it(self) -> None:
        taken = self.copy.take(self.registry.changes_since(self.copy.position))
        assert taken is not None
        assert self.copy.records == self.registry.records()
        assert self.copy.num_pool_pages == self.known_pool

    @invariant()
    def nothing_is_asked_any_more(self) -> None:
        order = self.registry._order
        assert order._going == order._latest == {}


RegistryMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
test_registrations_against_a_model = RegistryMachine.TestCase
