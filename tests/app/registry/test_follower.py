import asyncio

import pytest

from app.registry.follower import RegistryView, follow_registry
from app.registry.registrations import Registrations
from slora_core.errors import AdapterNotFoundError
from tests.app.fakes import FakeRegistry


def test_a_name_unknown_here_is_asked_of_the_registry():
    async def run():
        registry = FakeRegistry("a")
        view = RegistryView(registry)
        assert (await view.find("a")).name == "a"
        await view.find("a")
        assert registry.num_asked == 1
        with pytest.raises(AdapterNotFoundError, match="'b'"):
            await view.find("b")
        assert registry.num_asked == 2

    asyncio.run(run())


def test_it_follows_the_registry_and_tells_what_is_gone():
    async def run():
        registry = FakeRegistry("a", "b")
        gone = []
        view = RegistryView(registry, gone.append)
        following = asyncio.create_task(view.follow())
        await asyncio.sleep(0.05)
        assert set(view.records) == {"a", "b"}
        await registry.load("a", "/new", replace=True)
        await asyncio.sleep(0.05)
        assert view.has_id("a-v2") and not view.has_id("a-v1")
        await registry.unload("b")
        await asyncio.sleep(0.05)
        following.cancel()
        assert gone == [{"a-v1"}, {"b-v1"}]
        assert view.records["a"].path == "/new"

    asyncio.run(run())


def test_it_never_goes_back_in_time():
    async def run():
        registry = FakeRegistry("a")
        changes_since, is_sent = registry.changes_since, asyncio.Event()

        async def late_answer(position):
            old = await changes_since(position)
            await is_sent.wait()
            return old

        registry.changes_since = late_answer
        view = RegistryView(registry)
        refreshing = asyncio.create_task(view.refresh())
        await asyncio.sleep(0.05)
        registry.changes_since = changes_since
        await registry.load("b", "/b", replace=False)
        following = asyncio.create_task(view.follow())
        await asyncio.sleep(0.05)
        is_sent.set()
        await refreshing
        following.cancel()
        assert set(view.records) == {"a", "b"}

    asyncio.run(run())


def test_it_outlives_a_registry_that_fails(monkeypatch):
    monkeypatch.setattr("app.registry.follower.RETRY_S", 0.01)

    async def run():
        registry = FakeRegistry("a")
        wait, num_calls = registry.wait_for_change, 0

        async def failing(position, timeout_s):
            nonlocal num_calls
            num_calls += 1
            if num_calls <= 2:
                raise ConnectionError("the registry is restarting")
            return await wait(position, timeout_s)

        registry.wait_for_change = failing
        view = RegistryView(registry)
        following = asyncio.create_task(view.follow())
        await asyncio.sleep(0.2)
        following.cancel()
        assert set(view.records) == {"a"}

    asyncio.run(run())


def test_a_registry_that_is_replaced_while_it_is_asked_is_asked_again():
    async def run():
        registry, other = FakeRegistry("a", "b"), FakeRegistry("b", "c")
        view = RegistryView(registry)
        await view.refresh()
        changes_since = registry.changes_since

        async def of_the_one_before(position):
            changes = await changes_since(position)
            registry.history, registry.records = other.history, other.records
            registry.changes_since = changes_since
            # Overtaken by what the follower hears of the new one.
            view._apply(await registry.changes_since(view._copy.position))
            await registry.load("e", "/e", replace=False)
            return changes

        await registry.load("d", "/d", replace=False)
        registry.changes_since = of_the_one_before
        await view.refresh()
        assert set(view.records) == {"b", "c", "e"}

    asyncio.run(run())


def test_what_could_not_be_told_comes_once_more(monkeypatch):
    """The copy is ahead of who was to be told, so that changes alone would leave a gap."""
    monkeypatch.setattr("app.registry.follower.RETRY_S", 0.01)

    async def run():
        registry, told = FakeRegistry("a"), []
        copy = Registrations()

        def take(changes):
            copy.take(changes)
            if len(told) == 1 and not changes.is_whole:
                raise ValueError("it could not be taken to its end")
            told.append(changes)

        following = asyncio.create_task(follow_registry(registry, lambda: copy.position, take))
        await asyncio.sleep(0.05)
        await registry.load("b", "/b", replace=False)
        await asyncio.sleep(0.2)
        following.cancel()
        assert [changes.is_whole for changes in told] == [True, True]
        assert told[-1].records.keys() == {"a", "b"}

    asyncio.run(run())
