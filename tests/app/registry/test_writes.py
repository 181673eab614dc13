"""What is written of a change, and when."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from app.registry.inspector import Inspection
from app.registry.state_file import StateFile
from app.registry.table import RegistrationTable
from tests.app.fakes import make_record
from tests.app.registry.registry_model import GEOMETRY


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


def bytes_of_a_change(num_adapters: int, path: Path) -> tuple[int, int]:
    """What one more load writes to the file's disk, and sends to each follower."""
    table = RegistrationTable(GEOMETRY, StateFile(path))
    for number in range(num_adapters):
        table.register(Inspection(make_record(f"a{number}"), (1, 2, 3), 0.0))
    table.write()
    position, before = table.position, bytes_written()
    table.register(Inspection(make_record("new"), (1, 2, 3), 0.0))
    table.write()
    return bytes_written() - before, len(pickle.dumps(table.changes_since(position)))


def bytes_written() -> int:
    """By this thread in all its life."""
    counters = dict(line.split() for line in Path("/proc/thread-self/io").read_text().splitlines())
    return int(counters["wchar:"])


def test_a_change_costs_the_same_among_few_and_many(tmp_path) -> None:
    few_written, few_sent = bytes_of_a_change(10, tmp_path / "few")
    many_written, many_sent = bytes_of_a_change(5000, tmp_path / "many")
    # Some pages of 4 KiB, and what they were before: one page more where a row needs room.
    assert few_written <= many_written <= 50_000
    # Numbers have more digits.
    assert few_sent <= many_sent <= few_sent + 20 <= 1000


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
