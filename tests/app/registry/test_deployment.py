"""The registry as its deployment has it, without Ray: what polls get, and whose call is last."""

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from app import in_place
from app.args import SLoRAArgs
from app.registry import deployment
from app.registry.pools import LivingPools
from app.registry.registrations import Registrations
from app.registry.registry import AdapterRegistry
from tests.app.registry.registry_model import Disk, DiskInspector, Follower


class SavedEntries:
    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}

    def read(self):
        return dict(self.entries)

    def write(self, entries):
        self.entries.update(entries)


@pytest.fixture
def start(monkeypatch):
    """Starts the deployment's replica, each on what the one before has written."""
    disk, saved = Disk({"/p": 2, "/q": 3}), SavedEntries()
    monkeypatch.setattr("app.registry.upkeep.files_stamp", disk.stamp)
    monkeypatch.setattr(
        deployment,
        "_open_registry",
        lambda args, app_name: AdapterRegistry(DiskInspector(disk), LivingPools(100), saved),
    )
    context = SimpleNamespace(app_name="tests")
    monkeypatch.setattr(deployment.serve, "get_replica_context", lambda: context)

    async def start_replica():
        server = deployment.RegistryServer.__new__(deployment.RegistryServer)
        # As Serve does it.
        await server.__init__(None)
        return server

    return start_replica


def test_a_watcher_that_was_away_over_a_restart_is_told_at_once(start) -> None:
    """Its number of changes may be the new registry's own by then."""

    async def main():
        server, copy = await start(), Registrations()
        await server.load("a", "/p")
        await server.load("b", "/p")
        copy.take(await server.wait_for_change(None, 30))
        server = await start()
        await server.unload("b")
        await server.load("a", "/q", replace=True)
        while server._registry.position.revision < copy.position.revision:
            await server.load("c", "/q")
        assert server._registry.position.revision == copy.position.revision
        changes = await asyncio.wait_for(server.wait_for_change(copy.position, 600), 30)
        assert changes.is_whole
        assert copy.take(changes).gone == {"id-2"}
        assert copy.records == server._registry.records()

    asyncio.run(main())


def test_a_watcher_is_given_what_changed_and_no_more(start) -> None:
    async def main():
        server = await start()
        for number in range(50):
            await server.load(f"a{number}", "/p")
        position = (await server.wait_for_change(None, 30)).position
        waiting = asyncio.create_task(server.wait_for_change(position, 600))
        await asyncio.sleep(0)
        await server.load("new", "/q")
        changes = await asyncio.wait_for(waiting, 30)
        assert (changes.since, changes.records.keys()) == (position, {"new"})

    asyncio.run(main())


def test_an_answer_of_a_registry_that_has_ended_is_caught_up_with(start) -> None:
    async def main():
        follower, old = Follower(), await start()
        await old.load("a", "/p")
        late = await old.changes_since(None)
        new = await start()
        await new.load("b", "/q")
        follower.hear(new._registry)
        # Of the one before, and whole, since its asker knew nothing then.
        follower.copy.take(late)
        changes = await asyncio.wait_for(new.wait_for_change(follower.copy.position, 600), 30)
        follower.copy.take(changes)
        assert follower.copy.records == new._registry.records()

    asyncio.run(main())


class LastFirst(ThreadPoolExecutor):
    """Begins what is to be run in the wrong order, once all of it is there."""

    def __init__(self, num_calls: int) -> None:
        super().__init__(1)
        self._num_calls = num_calls
        self._calls: list[tuple] = []

    def submit(self, function, /, *args, **kwargs):
        outer: Future = Future()
        self._calls.append((outer, function, args, kwargs))
        if len(self._calls) == self._num_calls:
            for future, called, values, options in reversed(self._calls):
                super().submit(self._run, future, called, values, options)
        return outer

    @staticmethod
    def _run(future, function, args, kwargs):
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)


def test_the_call_that_came_last_holds_whichever_thread_begins_first(start) -> None:
    async def main():
        server = await start()
        asyncio.get_running_loop().set_default_executor(LastFirst(2))
        first, last = await asyncio.gather(
            server.load("a", "/p", replace=True), server.load("a", "/q", replace=True)
        )
        assert first == last == server._registry.records()["a"]
        assert last.path == "/q"

    asyncio.run(main())


def test_memory_of_loads_is_given_back_now_and_then(start, monkeypatch) -> None:
    monkeypatch.setattr(deployment, "LOOK_AGAIN_S", 0.01)
    given_back = asyncio.Event()

    async def main():
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(
            deployment, "give_memory_back", lambda: loop.call_soon_threadsafe(given_back.set)
        )
        server = await start()
        for _ in range(2):
            given_back.clear()
            await asyncio.wait_for(given_back.wait(), 30)
        server._looking.cancel()

    asyncio.run(main())


def test_only_other_directories_are_taken_up(start, monkeypatch) -> None:
    """Serve reconfigures every replica once more when it has started."""

    async def main():
        server = await start()
        server._args = before = SLoRAArgs(adapters_dir="/a")
        used = []
        monkeypatch.setattr(server._registry, "use_directories", lambda *given: used.append(given))
        await server.reconfigure(in_place.settings(in_place.REGISTRY, before))
        assert used == []
        later = SLoRAArgs(adapters_dir="/b", allowed_adapter_roots=["/c"])
        for _ in range(2):
            await server.reconfigure(in_place.settings(in_place.REGISTRY, later))
        assert used == [("/b", ["/c", "/b"])]

    asyncio.run(main())
