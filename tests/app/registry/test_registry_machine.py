"""Random loads, unloads, changes of files, pools, full disks and restarts, against a model."""

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.registry import upkeep
from app.registry.pools import FORGET_AFTER_S, LivingPools
from app.registry.registry import AdapterRegistry
from app.registry.retries import MAX_PAUSE_S, Retries
from app.registry.table import RegistrationTable
from slora_core.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    AdapterTooLargeError,
    InvalidAdapterError,
)
from tests.app.registry.registry_model import (
    GEOMETRY,
    Disk,
    DiskInspector,
    Follower,
    Model,
    Name,
    without_reasons,
)

DIRECTORY = "/d"
NAMES = st.sampled_from(["a", "b"])
# Of the folders that a scan finds.
PATHS = NAMES.map(lambda name: f"{DIRECTORY}/{name}")
# Content of a folder: its adapter's pages; None where there is no adapter.
CONTENTS = st.sampled_from([None, 2, 3, 8])


class RegistryMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.disk = Disk({f"{DIRECTORY}/a": 2, f"{DIRECTORY}/b": 8})
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(upkeep, "files_stamp", lambda path: self.disk.stamp(str(path)))
        self.patch.setattr(upkeep, "_folders", lambda path: [Path(path, n) for n in "ab"])
        self.now = 0.0
        self.saved: dict[str, bytes] = {}
        self.is_disk_full = False
        self.model = Model()
        self.near, self.far = Follower(), [Follower(), Follower()]
        self.open()

    def teardown(self) -> None:
        self.patch.undo()

    # The registry's `StateStore`.

    def read(self):
        return dict(self.saved)

    def write(self, entries):
        if self.is_disk_full:
            raise OSError("no space left")
        self.saved.update(entries)

    def open(self) -> None:
        self.registry = AdapterRegistry(
            DiskInspector(self.disk),
            LivingPools(None, lambda: self.now),
            self,
            retries=Retries(lambda: self.now),
        )

    @rule(path=PATHS, content=CONTENTS)
    def files_change(self, path, content) -> None:
        self.disk.write(path, content)

    @rule(path=PATHS)
    def files_move(self, path) -> None:
        self.disk.move_away_or_back(path)

    @rule(name=NAMES)
    def ask(self, name) -> None:
        """For what is done later."""
        self.model.asked.append((name, self.registry.ask(name)))

    def number(self, name: str, was_asked: bool) -> int:
        """The one that was asked first, or one that is asked now."""
        asked = [number for other, number in self.model.asked if other == name and was_asked]
        if not asked:
            return self.registry.ask(name)
        self.model.asked.remove((name, asked[0]))
        return asked[0]

    @rule(name=NAMES, path=PATHS, may_replace=st.booleans(), was_asked=st.booleans())
    def load(self, name, path, may_replace, was_asked) -> None:
        model, content = self.model, self.disk.content(path)
        known, number = model.find(name), self.number(name, was_asked)
        is_late = model.done.get(name, 0) > number
        expected = None
        if content is None:
            expected = InvalidAdapterError
        elif is_late and known.content is None:
            expected = AdapterNotFoundError
        elif not is_late and known.content not in (None, content) and not may_replace:
            expected = AdapterExistsError
        elif not is_late and not model.fits(content):
            expected = AdapterTooLargeError
        if expected is not None:
            with pytest.raises(expected):
                self.registry.load(name, path, may_replace, number)
            return
        record = self.registry.load(name, path, may_replace, number)
        if not is_late:
            model.learn(name, self.disk, path)
            model.done[name] = number
        assert without_reasons({name: record})[name] == model.records()[name]

    @rule(name=NAMES, was_asked=st.booleans())
    def unload(self, name, was_asked) -> None:
        model, number = self.model, self.number(name, was_asked)
        is_late = model.done.get(name, 0) > number
        means = model.find(name).content
        has_older = any(other == name and older < number for other, older in model.asked)
        if not is_late and means is None and not has_older:
            with pytest.raises(AdapterNotFoundError):
                self.registry.unload(name, number)
            return
        unloaded = self.registry.unload(name, number)
        if is_late or means is None:
            assert unloaded is None
        else:
            assert without_reasons({name: unloaded})[name] == model.records()[name]
        if not is_late:
            model.names.setdefault(name, Name()).content = None
            model.done[name] = number

    @rule()
    def scan(self) -> None:
        model = self.model
        for name in "ab":
            path, known = f"{DIRECTORY}/{name}", model.names.get(name)
            is_changed = known is not None and known.content is not None and known.path == path
            is_news = known is None or (is_changed and known.stamp != self.disk.stamp(path))
            content = self.disk.content(path)
            if is_news and content is not None and model.fits(content):
                model.learn(name, self.disk, path)
        self.registry.scan(DIRECTORY)

    @rule(replica=st.sampled_from("rs"), pages=st.sampled_from([4, 100]))
    def report_pool(self, replica, pages) -> None:
        self.registry.report_pool(replica, pages)
        self.model.pools[replica] = (pages, self.now)
        self.model.count_pools(self.now)

    @rule(seconds=st.sampled_from([0, FORGET_AFTER_S / 2, FORGET_AFTER_S, MAX_PAUSE_S]))
    def look_again_after_a_while(self, seconds) -> None:
        self.now += seconds
        self.registry.look_again()
        self.model.count_pools(self.now)
        # Files that are an adapter now have changed since, and are looked at at once.
        for name in self.model.unavailable():
            self.model.learn(name, self.disk, self.model.names[name].path)

    @rule()
    def disk_fills(self) -> None:
        self.is_disk_full = True

    @precondition(lambda self: self.is_disk_full)
    @rule()
    def disk_has_room_again(self) -> None:
        self.is_disk_full = False
        self.look_again_after_a_while(0)

    @rule()
    def restart(self) -> None:
        """Without any goodbye: what was not written is lost."""
        self.open()
        self.model.restart(self.disk)

    @rule(which=st.integers(0, 1))
    def one_that_was_away_comes_back(self, which) -> None:
        self.far[which].hear(self.registry)

    @invariant()
    def the_registry_is_as_the_model(self) -> None:
        records = self.registry.records()
        assert without_reasons(records) == self.model.records()
        unavailable = {name for name, record in records.items() if record.unavailable}
        assert unavailable == self.model.unavailable()

    @invariant()
    def what_is_known_is_written(self) -> None:
        if not self.is_disk_full:
            self.model.write()
            assert RegistrationTable(GEOMETRY, self)._entries == self.registry._table._entries

    @invariant()
    def a_follower_knows_it(self) -> None:
        self.near.hear(self.registry)
        assert self.near.copy.num_pool_pages == self.model.num_pool_pages

    @invariant()
    def of_the_order_nothing_is_kept_but_what_is_asked(self) -> None:
        order, names = self.registry._order, {name for name, _ in self.model.asked}
        assert order._going.keys() == names and order._latest.keys() <= names


RegistryMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None
)
test_registrations_against_a_model = RegistryMachine.TestCase
