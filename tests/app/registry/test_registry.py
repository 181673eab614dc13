"""Registrations: versions, refusals, confinement to the roots, and what survives a restart."""

import errno
import logging
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from app.registry.inspector import AdapterInspector
from app.registry.pools import FORGET_AFTER_S, LivingPools
from app.registry.registry import AdapterRegistry
from app.registry.retries import MAX_PAUSE_S, Retries
from app.registry.state_file import StateFile
from slora_core.adapters import peft_weights
from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.adapters.peft_weights import inspect_peft_adapter
from slora_core.errors import (
    AdapterChangingError,
    AdapterExistsError,
    AdapterNameError,
    AdapterNotFoundError,
    AdapterPathError,
    AdapterTooLargeError,
    InvalidAdapterError,
)
from tests.factories import make_geometry, make_model, make_random_adapter


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("registry") / "model", "llama")


@pytest.fixture(scope="module")
def geometry(model_dir: Path) -> AdapterGeometry:
    return make_geometry(model_dir)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def add(root: Path, model_dir: Path):
    return lambda name, **options: make_random_adapter(root / name, model_dir, **options)


@pytest.fixture
def make(geometry: AdapterGeometry, root: Path, tmp_path: Path):
    """A registry whose state outlives it."""

    def make_registry(
        geometry=geometry, num_pool_pages=1000, allowed_roots=(root,), pools=None, **options
    ):
        return AdapterRegistry(
            AdapterInspector(geometry, allowed_roots),
            pools or LivingPools(num_pool_pages),
            **{"store": StateFile(tmp_path / "s" / "state"), **options},
        )

    return make_registry


def test_load_describes_the_adapter(make, add, geometry) -> None:
    path = add("one", rank=5)
    record = make().load("one", path)
    summary = inspect_peft_adapter(path, geometry)
    assert (record.name, record.version, record.path) == ("one", 1, str(path))
    assert (record.adapter_id, record.max_rank) == (summary.adapter_id, 5)
    assert (record.num_pages, record.nbytes) == (summary.num_pages, summary.nbytes)


def test_every_change_raises_the_revision(make, add) -> None:
    registry = make()
    positions = [registry.position]
    registry.load("a", add("a"))
    positions.append(registry.position)
    registry.load("a", add("a", seed=2), replace=True)
    positions.append(registry.position)
    registry.unload("a")
    positions.append(registry.changes_since().position)
    assert positions == sorted(set(positions))
    assert registry.changes_since().records == {}
    with pytest.raises(AdapterNotFoundError):
        registry.unload("a")
    assert registry.position == positions[-1]


def test_the_smallest_living_pool_counts_and_nothing_is_forgotten(make, add) -> None:
    now = 100.0
    registry = make(pools=LivingPools(None, clock=lambda: now))
    small, large = (registry.load(f"rank-{r}", add(f"rank-{r}", rank=r)) for r in (4, 64))
    assert registry.changes_since().num_pool_pages is None
    registry.report_pool("first", large.num_pages + 1)
    position = registry.position
    # Of two engines the smaller one counts; a larger one changes nothing.
    registry.report_pool("second", large.num_pages + 9)
    assert registry.position == position
    registry.report_pool("third", small.num_pages + 1)
    snapshot = registry.changes_since()
    assert snapshot.num_pool_pages == small.num_pages + 1 and snapshot.position > position
    assert set(snapshot.records) == {"rank-4", "rank-64"}
    with pytest.raises(AdapterTooLargeError):
        registry.load("again", large.path)
    # The small one is gone; the others tell on.
    now += FORGET_AFTER_S
    registry.report_pool("first", large.num_pages + 1)
    registry.look_again()
    assert registry.changes_since().num_pool_pages == large.num_pages + 1
    assert registry.load("again", large.path).num_pages == large.num_pages


def test_versions_count_contents_of_a_name(make, add) -> None:
    registry = make()
    first = registry.load("a", add("a"))
    with pytest.raises(AdapterExistsError, match="version 1 .* replace it or unload"):
        registry.load("a", add("other", seed=9))
    assert registry.load("a", first.path, replace=True).version == 1
    second = registry.load("a", add("a", seed=2), replace=True)
    assert second.version == 2 and second.adapter_id != first.adapter_id
    registry.unload("a")
    assert registry.load("a", second.path).version == 3
    assert registry.load("b", second.path).version == 1


def test_a_failed_replacement_keeps_the_old_version(make, add) -> None:
    registry = make()
    old = registry.load("a", add("a"))
    bad = add("bad")
    file = bad / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    position = registry.position
    with pytest.raises(InvalidAdapterError):
        registry.load("a", bad, replace=True)
    assert registry.records() == {"a": old} and registry.position == position


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a b", "a\n", "é", "a" * 129, "base", "a\0"])
def test_names_that_are_refused(make, add, name: str) -> None:
    with pytest.raises(AdapterNameError, match="adapter name"):
        make(reserved_names=["base"]).load(name, add("x"))


@pytest.mark.parametrize("name", ["a", "Team-1/date_iso:v2", "x@y+z", "a" * 128])
def test_names_that_are_taken(make, add, name: str) -> None:
    assert make().load(name, add("x")).name == name


def test_paths_are_confined_to_the_roots(make, add, root, tmp_path, model_dir) -> None:
    registry = make()
    outside = make_random_adapter(tmp_path / "outside", model_dir)
    (root / "link").symlink_to(outside)
    inside = add("inside")
    (tmp_path / "link_in").symlink_to(inside)
    half = add("half")
    (half / "adapter_config.json").unlink()
    (half / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    bad = [outside, "../outside", root / ".." / "outside", root / "link", "link", half]
    bad += ["/etc", "/nonexistent", "a\0b", "/", "/proc/self/root" + str(outside), "x" * 5000]
    for path in bad:
        with pytest.raises(AdapterPathError):
            registry.load("a", path)
    assert registry.load("a", tmp_path / "link_in").path == str(inside)
    assert registry.load("b", "inside").path == str(inside)
    with pytest.raises(InvalidAdapterError, match="not a directory"):
        registry.load("c", "nowhere")
    with pytest.raises(AdapterPathError, match="none are configured"):
        make(allowed_roots=[], store=None).load("a", inside)


def test_an_adapter_too_large_for_the_pool(make, add, geometry) -> None:
    path = add("a", rank=32)
    pages = make().load("a", path).num_pages
    registry = make(num_pool_pages=pages + 1)
    registry.load("b", path)
    assert set(registry.records()) == {"a", "b"}
    # Restarted with a smaller pool, it forgets none: there may be a larger one again.
    registry = make(num_pool_pages=pages)
    assert set(registry.records()) == {"a", "b"}
    mib = geometry.page_bytes / 2**20
    with pytest.raises(AdapterTooLargeError) as error:
        registry.load("c", path)
    assert str(error.value) == (
        f"adapter 'c' takes {pages} pages ({pages * mib:.2f} MiB) and a request at least one "
        f"more; the pool has {pages} pages ({pages * mib:.2f} MiB)"
    )


def test_unload_of_an_unknown_name_lists_a_few(make, add) -> None:
    registry = make()
    with pytest.raises(AdapterNotFoundError, match="'x'; none are loaded"):
        registry.unload("x")
    path = add("a")
    for i in range(10):
        registry.load(f"n{i}", path)
    with pytest.raises(AdapterNotFoundError, match=r"n0, .*, n7 and 2 more$"):
        registry.unload("x")


def test_scan_loads_the_good_and_reports_the_bad(make, add, root, tmp_path, model_dir) -> None:
    add("good")
    add("also_good", seed=2)
    add("dora", use_dora=True)
    add("bad name")
    add(".hidden")
    (root / "empty").mkdir()
    (root / "file").write_text("no adapter")
    (root / "away").symlink_to(make_random_adapter(tmp_path / "outside", model_dir))
    registry = make()
    failures = dict(registry.scan(root))
    assert set(registry.records()) == {"good", "also_good"}
    assert set(failures) == {"dora", "bad name", "empty", "away"}
    assert "use_dora" in str(failures["dora"])
    assert isinstance(failures["away"], AdapterPathError)
    with pytest.raises(AdapterPathError, match="cannot list"):
        registry.scan(root / "nowhere")


def test_a_second_scan_takes_what_is_new(make, add, root, tmp_path, model_dir) -> None:
    registry = make()
    add("same")
    add("changes")
    add("unloaded")
    add("moved")
    registry.scan(root)
    before = registry.records()
    registry.unload("unloaded")
    elsewhere = add(".deep/moved", seed=9)
    registry.load("moved", elsewhere, replace=True)
    shutil.rmtree(root / "changes")
    add("changes", seed=5)
    add("new")
    registry.scan(root)
    after = registry.records()
    assert set(after) == {"same", "changes", "moved", "new"}
    assert after["same"] == before["same"]
    assert after["changes"].version == 2
    assert after["moved"].path == str(elsewhere)


def test_registrations_survive_the_registry(make, add, root) -> None:
    registry = make()
    add("scanned")
    add("unloaded")
    registry.scan(root)
    registry.load("live", add(".deep/live", seed=1))
    registry.load("live", add(".deep/live2", seed=2), replace=True)
    registry.unload("unloaded")
    position, records = registry.position, registry.records()
    again = make()
    assert again.records() == records and again.position.epoch != position.epoch
    assert again.scan(root) == [] and again.records() == records
    assert again.load("unloaded", root / "unloaded").version == 2


def test_a_restart_forgets_nothing_and_checks_what_changed(make, add, root, caplog) -> None:
    registry = make()
    for name in ("same", "gone", "changed", "broken", "barred"):
        registry.load(name, add(name))
    records = registry.records()
    shutil.rmtree(root / "gone")
    add("changed", seed=8)
    (root / "broken" / "adapter_config.json").write_text("{}")
    shutil.rmtree(root / "barred")
    (root / "barred").symlink_to("/etc")
    again = make()
    assert again.records()["same"] == records["same"]
    assert again.records()["changed"].version == 2
    reasons = {"gone": "not a directory", "broken": "peft_type", "barred": "outside the allowed"}
    for name, reason in reasons.items():
        record = again.records()[name]
        assert reason in record.unavailable
        assert replace(record, unavailable=None) == records[name]
    assert {r.args[0] for r in caplog.records if r.levelname == "WARNING"} == set(reasons)
    # What it was is known over further restarts.
    assert make().records() == again.records()


def test_files_that_come_back_are_found(make, add, root) -> None:
    make().load("a", add("a"))
    (root / "a").rename(root / "away")
    registry = make()
    assert registry.records()["a"].unavailable
    position = registry.position
    registry.look_again()
    assert registry.position == position
    (root / "away").rename(root / "a")
    registry.look_again()
    record = registry.records()["a"]
    assert record.unavailable is None and record.version == 1 and registry.position > position


def test_what_a_disk_did_not_give_is_tried_again(make, add, model_dir, monkeypatch) -> None:
    """The files are as they were, so that nothing but time tells."""
    make().load("a", add("a"))
    # So that it is looked at at the start.
    other_geometry = make_geometry(model_dir, page_tokens=4)
    now, num_reads = 0.0, 0

    def failing(path, flags):
        nonlocal num_reads
        num_reads += 1
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(peft_weights, "_open_without_waiting", failing)
        registry = make(geometry=other_geometry, retries=Retries(lambda: now))
        assert "Input/output error" in registry.records()["a"].unavailable
        for _ in range(60):
            now += 10
            registry.look_again()
        assert num_reads == 1 + 5, "after 10, 20, 40, 80 and 160 s"
    now += 10
    registry.look_again()
    assert registry.records()["a"].unavailable
    now += MAX_PAUSE_S
    registry.look_again()
    assert registry.records()["a"].unavailable is None


def test_files_that_are_no_adapter_are_read_once(make, add, root, monkeypatch) -> None:
    make().load("a", add("a"))
    (root / "a" / "adapter_config.json").write_text("{}")
    registry = make()
    inspected = []
    inspect = registry._inspector.inspect
    monkeypatch.setattr(
        registry._inspector, "inspect", lambda *args: inspected.append(args) or inspect(*args)
    )
    for _ in range(3):
        registry.look_again()
    assert inspected == [] and "peft_type" in registry.records()["a"].unavailable
    (root / "a" / "adapter_config.json").write_text("[]")
    for _ in range(3):
        registry.look_again()
    assert len(inspected) == 1 and "JSON object" in registry.records()["a"].unavailable
    add("a", seed=5)
    registry.look_again()
    assert registry.records()["a"].unavailable is None and registry.records()["a"].version == 2
    registry.unload("a")
    registry.look_again()
    assert registry.records() == {}


class SlowInspector(AdapterInspector):
    """Reads a folder at once, and hands over what it has of the one named `slow` when told to."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.has_read, self.may_go_on = threading.Event(), threading.Event()

    def _inspect(self, name, directory, stamp):
        found = super()._inspect(name, directory, stamp)
        if Path(directory).name == "slow" and not self.has_read.is_set():
            self.has_read.set()
            assert self.may_go_on.wait(30)
        return found


@pytest.fixture
def slow(geometry, root):
    """A registry whose load of the folder `slow` can be held, and the hold."""
    inspector = SlowInspector(geometry, [root])
    return AdapterRegistry(inspector, LivingPools(1000)), inspector


def test_of_two_loads_the_one_asked_last_holds(slow, add, root) -> None:
    registry, inspector = slow
    registry.load("name", add("first", seed=1))
    with ThreadPoolExecutor(1) as pool:
        older = pool.submit(registry.load, "name", add("slow", seed=2), replace=True)
        assert inspector.has_read.wait(30)
        newer = registry.load("name", add("quick", seed=3), replace=True)
        inspector.may_go_on.set()
        assert older.result(30) == newer
    assert registry.records()["name"] == newer and newer.path == str(root / "quick")


def test_a_folder_that_is_swapped_while_it_is_loaded_and_loaded_again(slow, add, root) -> None:
    """Both answer, and the name means what is in the folder now."""
    registry, inspector = slow
    add("slow", seed=1)
    with ThreadPoolExecutor(1) as pool:
        older = pool.submit(registry.load, "name", root / "slow", replace=True)
        assert inspector.has_read.wait(30)
        add("next", seed=2)
        (root / "slow").rename(root / "old")
        (root / "next").rename(root / "slow")
        newer = registry.load("name", root / "slow", replace=True)
        inspector.may_go_on.set()
        assert older.result(30) == newer
    now = inspect_peft_adapter(root / "slow", registry._inspector.geometry).adapter_id
    assert registry.records()["name"].adapter_id == now


def test_a_load_reads_again_where_its_folder_is_swapped(slow, add, root) -> None:
    registry, inspector = slow
    add("slow", seed=1)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(registry.load, "name", root / "slow")
        assert inspector.has_read.wait(30)
        shutil.rmtree(root / "slow")
        add("slow", seed=2)
        inspector.may_go_on.set()
        record = loading.result(30)
    geometry = registry._inspector.geometry
    assert record.adapter_id == inspect_peft_adapter(root / "slow", geometry).adapter_id


@pytest.mark.parametrize("is_registered", [True, False])
def test_an_unload_that_is_asked_later_holds(slow, add, root, is_registered) -> None:
    registry, inspector = slow
    if is_registered:
        registry.load("name", add("first", seed=1))
    with ThreadPoolExecutor(1) as pool:
        older = pool.submit(registry.load, "name", add("slow", seed=2), replace=True)
        assert inspector.has_read.wait(30)
        unloaded = registry.unload("name")
        assert (unloaded is not None) == is_registered
        inspector.may_go_on.set()
        with pytest.raises(AdapterNotFoundError, match="was unloaded while it was loaded"):
            older.result(30)
    assert registry.records() == {}
    with pytest.raises(AdapterNotFoundError, match="no adapter is named 'name'"):
        registry.unload("name")
    assert registry.load("name", root / "slow").version == 1 + is_registered


def test_what_is_asked_is_numbered_before_it_is_done(make, add, root) -> None:
    """Threads may begin in another order."""
    registry = make()
    registry.load("a", add("one", seed=1))
    unload, load = registry.ask("a"), registry.ask("a")
    newer = registry.load("a", add("two", seed=2), replace=True, asked=load)
    assert registry.unload("a", asked=unload) is None
    assert registry.records() == {"a": newer}


def test_a_load_that_fails_leaves_nothing_behind(make, add, root) -> None:
    registry = make()
    for name in ("a", "not a name"):
        with pytest.raises((InvalidAdapterError, AdapterNameError)):
            registry.load(name, "nowhere")
    with pytest.raises(AdapterNotFoundError):
        registry.unload("a")
    assert registry._order._going == registry._order._latest == {}


def test_what_nobody_asked_for_never_beats_what_somebody_did(slow, add, root, tmp_path) -> None:
    """A folder is found back while its name is unloaded, or given to another adapter."""
    for ask in ("unload", "load"):
        store = StateFile(tmp_path / ask)
        inspector = SlowInspector(slow[1].geometry, [root])
        AdapterRegistry(inspector, LivingPools(1000), store).load("a", add("other", seed=3))
        inspector.has_read.set()
        AdapterRegistry(inspector, LivingPools(1000), store).load(
            "a", add("slow", seed=1), replace=True
        )
        (root / "slow").rename(root / "away")
        registry = AdapterRegistry(inspector, LivingPools(1000), store)
        (root / "away").rename(root / "slow")
        inspector.has_read.clear()
        inspector.may_go_on.clear()
        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(registry.look_again)
            assert inspector.has_read.wait(30)
            if ask == "unload":
                registry.unload("a")
            else:
                registry.load("a", root / "other", replace=True)
            standing = registry.records()
            inspector.may_go_on.set()
            looking.result(30)
        assert registry.records() == standing
        shutil.rmtree(root / "slow")


def test_a_load_under_way_is_not_beaten_by_a_look(slow, add, root, tmp_path) -> None:
    registry, inspector = slow
    AdapterRegistry(inspector, LivingPools(1000), store := StateFile(tmp_path / "state")).load(
        "a", add("mine", seed=1)
    )
    (root / "mine").rename(root / "away")
    registry = AdapterRegistry(inspector, LivingPools(1000), store)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(registry.load, "a", add("slow", seed=2), replace=True)
        assert inspector.has_read.wait(30)
        (root / "away").rename(root / "mine")
        registry.look_again()
        assert registry.records()["a"].unavailable is None
        inspector.may_go_on.set()
        record = loading.result(30)
    assert registry.records() == {"a": record} and record.path == str(root / "slow")


def test_the_same_content_again_is_no_error(make, add, root) -> None:
    registry = make()
    first = registry.load("a", add("a"))
    assert registry.load("a", root / "a").version == first.version
    shutil.copytree(root / "a", root / "copy")
    assert registry.load("a", root / "copy").path == str(root / "copy")
    with pytest.raises(AdapterExistsError, match="with another content; ask to replace it"):
        registry.load("a", add("b", seed=4))


def test_files_that_change_while_they_are_read_are_read_again(make, add, monkeypatch) -> None:
    from app.registry import inspector

    registry = make()
    path = add("a")
    stamps = iter([(1,), (2,), (2,), (1,), (2,), (3,)])
    monkeypatch.setattr(inspector, "files_stamp", lambda directory: next(stamps))
    assert registry.load("a", path).name == "a"
    with pytest.raises(AdapterChangingError, match="changed while they were read; try again"):
        registry.load("b", path)


def test_a_scan_checks_folders_side_by_side_and_says_what_it_took(
    make, add, root, caplog, monkeypatch
) -> None:
    for index in range(6):
        add(f"a{index}", seed=index)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(3))
    together = threading.Barrier(3, timeout=30)
    inspect = AdapterInspector._inspect

    def inspect_together(self, *args):
        together.wait()
        return inspect(self, *args)

    monkeypatch.setattr(AdapterInspector, "_inspect", inspect_together)
    registry = make()
    with caplog.at_level(logging.INFO):
        registry.scan(root)
    assert list(registry.records()) == [f"a{index}" for index in range(6)]
    assert "checked 6 adapters, 0.00 GB, in" in caplog.text
    assert "reading and hashing are" in caplog.text and "of 3 threads" in caplog.text


def test_a_restart_with_another_geometry_plans_anew(make, add, model_dir, root) -> None:
    record = make().load("a", add("a", rank=16))
    again = make(geometry=make_geometry(model_dir, page_tokens=4)).records()["a"]
    assert again.num_pages > record.num_pages and again.version == 1
    other = make_geometry(make_model(root / "other", "llama", hidden_size=128, head_dim=16))
    assert "q_proj" in make(geometry=other).records()["a"].unavailable


class CountingStore:
    """A store in memory, and what each write was of."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}
        self.writes: list[dict[str, bytes]] = []
        self.error: OSError | None = None

    def read(self):
        return dict(self.entries)

    def write(self, entries):
        if self.error is not None:
            raise self.error
        self.writes.append(dict(entries))
        self.entries.update(entries)


def test_a_change_writes_itself_alone(make, add) -> None:
    path, store = add("a"), CountingStore()
    registry = make(store=store)
    sizes = []
    for number in range(1000):
        registry.load(f"a{number}", path)
        assert store.writes[-1].keys() == {f"a{number}"}
        sizes.append(len(store.writes[-1][f"a{number}"]))
    assert max(sizes) < 1000 and len(store.writes) == 1000
    registry.unload("a7")
    assert store.writes[-1].keys() == {"a7"}
    store.writes.clear()
    again = make(store=store)
    assert store.writes == [] and again.records() == registry.records()
    again.report_pool("replica", 500)
    again.look_again()
    assert store.writes == []


def test_what_could_not_be_written_is_written_with_the_next_change(make, add, caplog) -> None:
    path, store = add("a"), CountingStore()
    registry = make(store=store)
    store.error = OSError("disk full")
    registry.load("a", path)
    registry.load("b", path)
    assert "cannot write the registry's state: disk full" in caplog.text
    assert set(registry.records()) == {"a", "b"} and store.entries == {}
    store.error = None
    registry.load("c", path)
    assert store.writes[-1].keys() == {"a", "b", "c"}
    store.error = OSError("disk full")
    registry.unload("a")
    store.error = None
    registry.look_again()
    assert make(store=store).records() == registry.records()


def test_changes_that_wait_for_a_write_are_written_together(make, add) -> None:
    path, store = add("a"), CountingStore()
    is_writing, may_go_on = threading.Event(), threading.Event()
    write = store.write

    def slow_write(entries):
        is_writing.set()
        assert may_go_on.wait(30)
        write(entries)

    store.write = slow_write
    registry = make(store=store)
    names = [f"a{number}" for number in range(8)]
    with ThreadPoolExecutor(9) as pool:
        loads = [pool.submit(registry.load, "first", path)]
        assert is_writing.wait(30)
        loads += [pool.submit(registry.load, name, path) for name in names]
        while set(registry.records()) != {"first", *names}:
            time.sleep(0.001)
        # Registered, and not answered yet: none of them is written.
        assert not any(load.done() for load in loads)
        may_go_on.set()
        for load in loads:
            load.result(30)
    assert [set(entries) for entries in store.writes] == [{"first"}, set(names)]


def test_threads_may_load_and_unload_at_once(make, add) -> None:
    registry = make()
    paths = [add(f"a{i}", seed=i) for i in range(4)]
    errors: list[Exception] = []

    def work(mine: int) -> None:
        try:
            for i in range(10):
                registry.load(f"shared{i}", paths[mine], replace=True)
                registry.load(f"own{mine}", paths[i % 4], replace=True)
                registry.unload(f"own{mine}")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert set(registry.records()) == {f"shared{i}" for i in range(10)}
    assert make().records() == registry.records()
