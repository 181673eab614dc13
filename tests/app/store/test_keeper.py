"""Registered means served: what becomes of files after a load is no matter of its users."""

import asyncio
import logging
import os
import shutil
import time
from io import FileIO
from pathlib import Path

import pytest
import torch

from app.registry.follower import follow_registry
from app.registry.inspector import Inspection
from app.store import adapter_sources, keeper
from app.store.adapter_sources import LOG_EVERY_S, UnavailableLog
from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.adapters.slab_reader import SlabReader
from slora_core.errors import AdapterUnavailableError
from tests.app.fakes import make_record
from tests.app.store.world import World, run_world
from tests.factories import make_model, make_random_adapter

ME = os.getpid()
PACKED = 1 << 28


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("keeper") / "model")


@pytest.fixture
def run(tmp_path, model):
    """Run `scenario(world)` on a loop; several times for several stores on one node."""

    def run_scenario(scenario, packed_bytes=PACKED, **options):
        run_world(scenario, tmp_path, model, packed_bytes=packed_bytes, **options)

    return run_scenario


@pytest.fixture
def reads(monkeypatch):
    """Names of the adapters whose own files were read, in order."""
    names: list[str] = []
    original = adapter_sources.read_peft_adapter

    def read(path, geometry, rules):
        names.append(Path(path).name)
        return original(path, geometry, rules)

    monkeypatch.setattr(adapter_sources, "read_peft_adapter", read)
    return names


def in_files(world, *records):
    return lambda: all(record.adapter_id in world.files for record in records)


def pages_of(world, location):
    return SlabReader(world.geometry).open(location).pages


def expected_pages(world, record):
    return load_packed_adapter(record.path, world.geometry).pages


def two_fit(tmp_path, model) -> int:
    """Bytes of a slab that holds two adapters of rank 16."""
    nbytes = World(tmp_path, model).add("probe", rank=16).nbytes
    return 2 * nbytes + 3 * 4096


def rewrite(world, record):
    make_random_adapter(record.path, world.model, seed=99, rank=16)


def move(world, record):
    shutil.move(record.path, f"{record.path}-moved")


def delete(world, record):
    shutil.rmtree(record.path)


def truncate(world, record):
    (Path(record.path) / "adapter_model.safetensors").write_bytes(b"\x10")


@pytest.mark.parametrize("change", [rewrite, move, delete, truncate])
def test_files_that_change_after_a_load_do_not_matter(run, tmp_path, model, change) -> None:
    async def scenario(world):
        records = [world.add(f"a{i}", seed=i, rank=16) for i in range(5)]
        # Those that the slab has no room for, too.
        await world.until(in_files(world, *records))
        expected = [expected_pages(world, record) for record in records]
        for record in records:
            change(world, record)
        for _ in range(2):
            for record, pages in zip(records, expected, strict=True):
                location = await world.store.lease(record, ME)
                assert torch.equal(pages_of(world, location), pages)
                world.store.release(record.adapter_id, ME)
        stats = world.store.stats()
        assert stats.num_evictions >= 6 and stats.num_disk_reads >= 6
        assert (stats.num_packed_files, stats.num_unavailable) == (5, 0)
        assert stats.packed_file_bytes == 5 * (4096 + records[0].nbytes)

    run(scenario, capacity=two_fit(tmp_path, model))


def test_a_new_store_serves_what_only_the_disk_has(run, reads) -> None:
    records, expected = [], []

    async def first(world):
        records.extend(world.add(f"a{i}", seed=i) for i in range(3))
        await world.until(in_files(world, *records))
        expected.extend(expected_pages(world, record) for record in records)

    async def second(world):
        # The registry keeps what it had although the files are gone; so it is played here.
        for record in records:
            world.registry.registry._table.register(Inspection(record, None, 0.0))
        await world.until(lambda: world.host.stats().num_adapters == 3)
        for record, pages in zip(records, expected, strict=True):
            location = await world.store.lease(record, ME)
            assert torch.equal(pages_of(world, location), pages)
        assert world.store.stats().num_disk_reads == 3 and world.store.stats().num_packs == 0

    run(first)
    for record in records:
        shutil.rmtree(record.path)
    reads.clear()
    run(second)
    assert reads == []


def test_a_damaged_file_is_replaced_from_the_adapters_own(run, reads) -> None:
    async def scenario(world):
        record = world.add("a")
        await world.until(in_files(world, record))
        [path] = (world.root / "packed").glob(f"*/{record.adapter_id}.packed")
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b"\xff")
        world.host.remove(record.adapter_id)
        location = await world.store.lease(record, ME)
        assert torch.equal(pages_of(world, location), expected_pages(world, record))
        assert reads == ["a", "a"]
        await world.until(lambda: path.exists() and path.read_bytes() == whole)

    run(scenario)


def test_nothing_that_was_not_checked_can_be_leased(run, monkeypatch) -> None:
    """A reading that turns out damaged leaves no entry, and those who wait get the source's."""

    async def scenario(world):
        record = world.add("a")
        await world.until(in_files(world, record))
        world.store._tasks[1].cancel()
        [path] = (world.root / "packed").glob(f"*/{record.adapter_id}.packed")
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        world.host.remove(record.adapter_id)
        locations = await asyncio.gather(*(world.store.lease(record, ME) for _ in range(5)))
        for location in locations:
            assert torch.equal(pages_of(world, location), expected_pages(world, record))
        assert world.store.stats().num_disk_reads == 0

    run(scenario)


def test_what_nothing_has_is_a_typed_error_counted_and_told(run, monkeypatch, caplog) -> None:
    told = []

    async def scenario(world):
        world.store._on_unavailable = lambda: told.append(1)
        record = world.add("a")
        await world.until(lambda: record.adapter_id in world.host)
        moved = shutil.move(record.path, f"{record.path}-moved")
        world.host.remove(record.adapter_id)
        for _ in range(3):
            with pytest.raises(AdapterUnavailableError, match="'a' in .* is not a directory"):
                await world.store.lease(record, ME)
        assert world.store.stats().num_unavailable == len(told) == 3
        assert caplog.text.count("adapter a is registered and cannot be served") == 1
        # The files are back.
        shutil.move(moved, record.path)
        await world.store.lease(record, ME)
        world.store.release(record.adapter_id, ME)
        # Somebody put others there: read once, however many ask.
        rewrite(world, record)
        world.host.remove(record.adapter_id)
        num_reads = []
        original = adapter_sources.read_peft_adapter
        monkeypatch.setattr(
            adapter_sources,
            "read_peft_adapter",
            lambda *args: num_reads.append(1) or original(*args),
        )
        for _ in range(3):
            with pytest.raises(AdapterUnavailableError, match="changed since version 1 was loaded"):
                await world.store.lease(record, ME)
        assert len(num_reads) == 1
        # A request that is late for a version that was replaced is no operator's matter.
        new = world.add("a", replace=True, seed=7)
        await world.until(lambda: new.adapter_id in world.host)
        with pytest.raises(AdapterUnavailableError):
            await world.store.lease(record, ME)
        assert world.store.stats().num_unavailable == 6

    with caplog.at_level(logging.ERROR):
        run(scenario, packed_bytes=0)


def test_a_line_of_the_log_for_each_adapter_and_minute(caplog) -> None:
    now = [0.0]
    log = UnavailableLog(lambda: now[0])
    for at, name in [(0, "a"), (1, "a"), (2, "b"), (LOG_EVERY_S - 1, "a"), (LOG_EVERY_S, "a")]:
        now[0] = at
        log.tell(make_record(name), AdapterUnavailableError("gone"))
    lines = [record.getMessage().split()[1] for record in caplog.records]
    assert lines == ["a", "b", "a"]


def test_a_replaced_version_leaves_the_disk_a_while_after_its_last_lease(run, monkeypatch) -> None:
    async def scenario(world):
        old = world.add("a")
        await world.until(in_files(world, old))
        expected = expected_pages(world, old)
        location = await world.store.lease(old, ME)
        new = world.add("a", replace=True, seed=5)
        await world.until(in_files(world, new))
        world.store._keeper.wake()
        await asyncio.sleep(0.05)
        assert old.adapter_id in world.files
        assert torch.equal(pages_of(world, location), expected)
        world.store.release(old.adapter_id, ME)
        world.store._keeper.wake()
        await asyncio.sleep(0.05)
        # Its engine has died, and its requests go on in another one.
        location = await world.store.lease(old, ME)
        assert torch.equal(pages_of(world, location), expected)
        monkeypatch.setattr(keeper, "STAYS_S", 0.0)
        world.store._keeper.wake()
        await world.until(lambda: world.store._keeper._gone[old.adapter_id] < time.monotonic())
        world.store.release(old.adapter_id, ME)
        # The next of the store's own looks.
        world.store._sweep_at = 0.0
        world.store._sweep()
        world.store._keeper.wake()
        await world.until(lambda: old.adapter_id not in world.files)
        assert new.adapter_id in world.files
        world.registry.registry.unload("a")
        await world.until(lambda: new.adapter_id not in world.files)
        assert world.store.stats().num_packed_files == 0

    run(scenario)


def test_what_was_loaded_last_is_packed_next(run, monkeypatch) -> None:
    """Many wait for their packing; whoever loads meanwhile need not keep the files for long."""
    order = []
    original = adapter_sources.read_peft_adapter

    async def scenario(world):
        def read(path, geometry, rules):
            order.append(Path(path).name)
            if len(order) == 2:
                world.add("late", seed=9)
                # Until the store has heard of it.
                while world.registry.registry.position != heard[-1]:
                    time.sleep(0.005)
            return original(path, geometry, rules)

        heard = []
        registrations = world.store._registrations

        def taking(changes):
            world.store._take_changes(changes)
            heard.append(changes.position)

        world.store._tasks[0].cancel()
        world.store._tasks[0] = asyncio.create_task(
            follow_registry(world.registry, lambda: registrations.position, taking)
        )
        monkeypatch.setattr(adapter_sources, "read_peft_adapter", read)
        for i in range(6):
            world.add(f"a{i}", seed=i)
        await world.until(lambda: len(order) == 7)
        assert order == ["a5", "a4", "late", "a3", "a2", "a1", "a0"]

    run(scenario)


def test_files_are_kept_within_the_limit_by_use(run, tmp_path, model, monkeypatch) -> None:
    capacity = two_fit(tmp_path, model)
    file_bytes = World(tmp_path, model).add("sized", rank=16).nbytes + 4096

    async def scenario(world):
        records = [world.add(f"a{i}", seed=i, rank=16) for i in range(5)]
        await world.until(lambda: world.files.num_files == 3)
        # Looking again changes nothing: none was loaded later than the others were used.
        world.store._keeper._recheck_at = 0
        world.store._keeper.wake()
        await asyncio.sleep(0.1)
        held = [record for record in records if record.adapter_id in world.files]
        assert len(held) == 3
        # One that is packed from its own files for a request displaces what was not used since.
        missing = next(record for record in records if record not in held)
        monkeypatch.setattr(keeper.time, "time", lambda: missing.loaded_at + 10)
        world.host.remove(missing.adapter_id)
        await world.store.lease(missing, ME)
        await world.until(in_files(world, missing))
        assert world.files.nbytes == 3 * file_bytes

    run(scenario, capacity=capacity, packed_bytes=3 * file_bytes)


def test_a_cache_that_was_emptied_is_filled_again(run) -> None:
    async def scenario(world):
        record = world.add("a")
        await world.until(in_files(world, record))
        shutil.rmtree(world.root / "packed")
        shutil.rmtree(record.path)
        world.store._keeper._recheck_at = 0
        world.store._keeper.wake()
        # From the slab.
        await world.until(in_files(world, record))

    run(scenario)


def test_files_that_come_back_are_packed(run, monkeypatch) -> None:
    async def scenario(world):
        world.store._tasks[1].cancel()
        record = world.add("a")
        moved = shutil.move(record.path, f"{record.path}-moved")
        world.store._tasks[1] = asyncio.create_task(world.store._keep_registered())
        await world.until(lambda: not world.store._keeper._pending)
        await asyncio.sleep(0.05)
        assert record.adapter_id not in world.host
        shutil.move(moved, record.path)
        world.store._keeper._recheck_at = 0
        world.store._keeper.wake()
        await world.until(in_files(world, record))
        assert record.adapter_id in world.host

    run(scenario)


def test_a_disk_that_does_not_give_a_file_is_no_error_while_the_adapters_own_are_there(
    run, monkeypatch
) -> None:
    async def scenario(world):
        record = world.add("a")
        await world.until(in_files(world, record))
        world.host.remove(record.adapter_id)

        class Failing(FileIO):
            def readinto(self, piece):
                raise OSError(5, "Input/output error")

        monkeypatch.setattr("app.store.packed_files.FileIO", Failing)
        location = await world.store.lease(record, ME)
        assert torch.equal(pages_of(world, location), expected_pages(world, record))
        assert record.adapter_id in world.files

    run(scenario)


def test_a_failing_disk_leaves_the_slab_as_it_is(run, monkeypatch, caplog) -> None:
    def full(fd, piece):
        raise OSError(28, "No space left on device")

    async def scenario(world):
        monkeypatch.setattr("app.store.packed_files.write_all", full)
        records = [world.add(f"a{i}", seed=i) for i in range(3)]
        await world.until(lambda: world.host.stats().num_adapters == 3)
        for record in records:
            await world.store.lease(record, ME)
        assert world.files.num_files == 0

    with caplog.at_level(logging.WARNING):
        run(scenario)
    assert caplog.text.count("No space left on device") == 1
