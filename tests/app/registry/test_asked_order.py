"""Of several changes of a name the one that was asked last holds, whatever is done first."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.registry.inspector import AdapterInspector
from app.registry.pools import LivingPools
from app.registry.registry import AdapterRegistry
from app.registry.state_file import StateFile
from slora_core.adapters.peft_weights import inspect_peft_adapter
from slora_core.errors import (
    AdapterNameError,
    AdapterNotFoundError,
    InvalidAdapterError,
)


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


@pytest.mark.parametrize("ask", ["load", "unload"])
def test_files_that_are_still_bad_say_nothing_of_what_somebody_asked_for(
    make, add, root, monkeypatch, ask
) -> None:
    """They are looked at while their name is unloaded, or given to another adapter."""
    make().load("a", add("bad"))
    (root / "bad" / "adapter_config.json").write_text("{}")
    registry, good = make(), add("good", seed=2)
    assert registry.records()["a"].unavailable
    (root / "bad" / "adapter_config.json").write_text("[]")
    inspect = registry._inspector.inspect

    def inspect_late(name, path):
        monkeypatch.setattr(registry._inspector, "inspect", inspect)
        if ask == "load":
            registry.load("a", good, replace=True)
        else:
            registry.unload("a")
        return inspect(name, path)

    monkeypatch.setattr(registry._inspector, "inspect", inspect_late)
    registry.look_again()
    records = registry.records()
    assert records.keys() == ({"a"} if ask == "load" else set())
    assert all(record.unavailable is None for record in records.values())
    assert make().records() == records


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
