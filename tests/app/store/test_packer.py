"""The node's store in asyncio, without Ray: packing once, following the registry, ending."""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import app.store.adapter_sources as adapter_sources
from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.adapters.slab_reader import SlabReader
from slora_core.errors import AdapterUnavailableError, StoreFullError
from tests.app.store.world import World, run_world
from tests.factories import make_model

ME = os.getpid()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("node_store") / "model")


@pytest.fixture
def run(tmp_path, model):
    """Run `scenario(world)` on a loop."""

    def run_scenario(scenario, **options):
        run_world(scenario, tmp_path, model, **options)

    return run_scenario


@pytest.fixture
def num_reads(monkeypatch):
    """Paths read, in order."""
    reads: list[str] = []
    lock = threading.Lock()
    original = adapter_sources.read_peft_adapter

    def read(path, geometry, rules):
        with lock:
            reads.append(Path(path).name)
        return original(path, geometry, rules)

    monkeypatch.setattr(adapter_sources, "read_peft_adapter", read)
    return reads


def test_registered_adapters_are_packed_ahead_and_removed_after(run) -> None:
    async def scenario(world):
        records = [world.add(f"a{i}", seed=i, rank=4 + i) for i in range(3)]
        await world.until(lambda: world.host.stats().num_adapters == 3)
        location = await world.store.lease(records[1], ME)
        expected = load_packed_adapter(records[1].path, world.geometry).pages
        pages = SlabReader(world.geometry).open(location).pages
        assert torch.equal(pages, expected)
        for name in ("a0", "a1"):
            world.registry.registry.unload(name)
        await world.until(lambda: world.host.adapter_ids() == [records[2].adapter_id])
        assert world.host.stats().num_draining == 1 and torch.equal(pages, expected)
        assert world.store.release(records[1].adapter_id, ME, location.extent.token)
        assert world.host.stats().num_adapters == 1

    run(scenario)


def test_concurrent_misses_read_once(run, num_reads) -> None:
    async def scenario(world):
        await asyncio.sleep(0.05)
        world.store._tasks[1].cancel()  # nothing is packed ahead
        record, other = world.add("a"), world.add("b", seed=2)
        await asyncio.gather(
            *(world.store.lease(record, ME) for _ in range(8)), world.store.lease(other, ME)
        )
        assert sorted(num_reads) == ["a", "b"]
        assert world.host.stats().num_leases == 9

    run(scenario)


def test_a_slow_read_holds_up_nobody_else(run, monkeypatch) -> None:
    original = adapter_sources.read_peft_adapter
    may_go_on = threading.Event()

    def read(path, geometry, rules):
        if Path(path).name == "slow":
            assert may_go_on.wait(30)
        return original(path, geometry, rules)

    monkeypatch.setattr(adapter_sources, "read_peft_adapter", read)

    async def scenario(world):
        slow, quick = world.add("slow"), world.add("quick", seed=2)
        waiting = asyncio.create_task(world.store.lease(slow, ME))
        left = asyncio.create_task(world.store.lease(slow, ME))
        await world.store.lease(quick, ME)
        left.cancel()
        assert not waiting.done()
        may_go_on.set()
        await waiting
        assert world.host.stats().num_leases == 2

    run(scenario)


def test_files_that_changed_are_refused_until_loaded_again(run) -> None:
    async def scenario(world):
        old = world.add("a")
        await world.until(lambda: old.adapter_id in world.host)
        new = world.add("a", replace=True, seed=5)
        await world.until(lambda: world.host.adapter_ids() == [new.adapter_id])
        with pytest.raises(AdapterUnavailableError, match="changed since version 1 was loaded"):
            await world.store.lease(old, ME)
        shutil.rmtree(world.root / "a")
        with pytest.raises(AdapterUnavailableError, match="not a directory"):
            await world.store.lease(old, ME)
        await world.store.lease(new, ME)

    run(scenario)


def test_packing_ahead_evicts_nothing_and_a_lease_does(run, model, tmp_path) -> None:
    async def scenario(world):
        records = [world.add(f"a{i}", seed=i, rank=16) for i in range(5)]
        await world.until(lambda: world.host.stats().num_adapters == 2)
        await asyncio.sleep(0.05)
        assert world.host.stats().num_evictions == 0
        for record in records:
            await world.store.lease(record, ME)
            world.store.release(record.adapter_id, ME)
        assert world.host.stats().num_evictions >= 3
        for record in records[:2]:
            await world.store.lease(record, ME)
        with pytest.raises(StoreFullError, match="under leases"):
            await world.store.lease(records[2], ME)

    nbytes = World(tmp_path, model).add("probe", rank=16).nbytes
    run(scenario, capacity=2 * nbytes + 3 * 4096)


def test_a_broken_adapter_does_not_stop_the_others(run) -> None:
    async def scenario(world):
        world.add("broken")
        (world.root / "broken" / "adapter_config.json").write_text("{}")
        good = world.add("good", seed=2)
        await world.until(lambda: world.host.adapter_ids() == [good.adapter_id])

    run(scenario)


@pytest.mark.parametrize("error", [OSError("I/O error"), MemoryError()])
def test_an_adapter_that_cannot_be_read_does_not_stop_the_others(run, monkeypatch, error) -> None:
    original = adapter_sources.read_peft_adapter

    def read(path, geometry, rules):
        if Path(path).name == "broken":
            raise error
        return original(path, geometry, rules)

    monkeypatch.setattr(adapter_sources, "read_peft_adapter", read)

    async def scenario(world):
        world.add("broken")
        good = world.add("good", seed=2)
        await world.until(lambda: world.host.adapter_ids() == [good.adapter_id])
        later = world.add("later", seed=3)
        await world.until(lambda: later.adapter_id in world.host)

    run(scenario)


def test_a_failed_removal_is_tried_again(run, monkeypatch) -> None:
    monkeypatch.setattr("app.registry.follower.RETRY_S", 0.01)

    async def scenario(world):
        record = world.add("a")
        await world.until(lambda: record.adapter_id in world.host)
        remove, errors = world.host.remove, [OSError("no memory")]

        def failing(adapter_id):
            if errors:
                raise errors.pop()
            return remove(adapter_id)

        monkeypatch.setattr(world.host, "remove", failing)
        world.registry.registry.unload("a")
        await world.until(lambda: record.adapter_id not in world.host)
        assert errors == []

    run(scenario)


def test_changes_that_could_not_be_taken_to_their_end_are_made_up_for(run, monkeypatch) -> None:
    """One of several at once fails, and with it those behind it."""
    monkeypatch.setattr("app.registry.follower.RETRY_S", 0.01)

    async def scenario(world):
        old = [world.add(name, seed=seed) for seed, name in enumerate("ab")]
        await world.until(lambda: all(record.adapter_id in world.host for record in old))
        remove, errors = world.host.remove, [OSError("no memory")]

        def failing(adapter_id):
            if errors:
                raise errors.pop()
            return remove(adapter_id)

        monkeypatch.setattr(world.host, "remove", failing)
        for name in "ab":
            world.registry.registry.unload(name)
        new = world.add("c", seed=3)
        await world.until(lambda: set(world.host.adapter_ids()) == {new.adapter_id})
        assert errors == []
        assert world.store._keeper.registered == {new.adapter_id: new}

    run(scenario)


def test_the_registry_may_be_away_for_a_while(run, monkeypatch) -> None:
    monkeypatch.setattr("app.registry.follower.RETRY_S", 0.01)

    async def scenario(world):
        world.registry.is_down = True
        record = world.add("a")
        await world.store.lease(record, ME)
        other = world.add("b", seed=2)
        await asyncio.sleep(0.05)
        assert other.adapter_id not in world.host
        world.registry.is_down = False
        await world.until(lambda: other.adapter_id in world.host)

    run(scenario)


def _process() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_leases_end_with_their_process(run) -> None:
    async def scenario(world):
        record = world.add("a")
        holder = _process()
        await world.store.lease(record, holder.pid)
        await world.store.lease(record, holder.pid)
        await world.store.lease(record, ME)
        holder.kill()
        await world.until(lambda: world.host.stats().num_leases == 1)
        holder.wait()

    run(scenario)


def test_the_store_is_unused_once_its_clients_are_gone(run) -> None:
    async def scenario(world):
        first, second = _process(), _process()
        attached = [asyncio.create_task(world.store.attach(p.pid)) for p in (first, second)]
        await asyncio.sleep(0.25)
        first.kill()
        await attached[0]
        await asyncio.sleep(0.25)
        assert not world.unused.is_set()
        second.kill()
        await attached[1]
        third = asyncio.create_task(world.store.attach(ME))
        await asyncio.sleep(0.25)
        assert not world.unused.is_set(), "a replacement came in time"
        third.cancel()
        first.wait(), second.wait()

    run(scenario, grace_s=0.2)


def test_a_store_that_nobody_attaches_to_is_unused(run) -> None:
    async def scenario(world):
        await world.unused.wait()

    run(scenario, grace_s=0.05)


def test_a_lease_of_a_store_before_is_not_confused(run) -> None:
    async def scenario(world):
        record = world.add("a")
        await world.store.lease(record, ME)
        assert not world.store.release(record.adapter_id, ME, "token of an older store")
        assert world.host.stats().num_leases == 1

    run(scenario)
