import asyncio

import pytest

from app.catalog_view import CatalogView
from slora_core.errors import AdapterNotFoundError
from tests.app.fakes import FakeCatalog


def test_a_name_unknown_here_is_asked_of_the_catalog():
    async def run():
        catalog = FakeCatalog("a")
        view = CatalogView(catalog)
        assert (await view.find("a")).name == "a"
        await view.find("a")
        assert catalog.num_snapshots == 1
        with pytest.raises(AdapterNotFoundError, match="'b'"):
            await view.find("b")
        assert catalog.num_snapshots == 2

    asyncio.run(run())


def test_it_follows_the_catalog_and_tells_what_is_gone():
    async def run():
        catalog = FakeCatalog("a", "b")
        gone = []
        view = CatalogView(catalog, gone.append)
        following = asyncio.create_task(view.follow())
        await asyncio.sleep(0.05)
        assert set(view.records) == {"a", "b"}
        await catalog.load("a", "/new", replace=True)
        await asyncio.sleep(0.05)
        assert view.has_id("a-v2") and not view.has_id("a-v1")
        await catalog.unload("b")
        await asyncio.sleep(0.05)
        following.cancel()
        assert gone == [{"a-v1"}, {"b-v1"}]
        assert view.records["a"].path == "/new"

    asyncio.run(run())


def test_it_never_goes_back_in_time():
    async def run():
        catalog = FakeCatalog("a")
        snapshot, is_sent = catalog.snapshot, asyncio.Event()

        async def late_snapshot():
            old = await snapshot()
            await is_sent.wait()
            return old

        catalog.snapshot = late_snapshot
        view = CatalogView(catalog)
        refreshing = asyncio.create_task(view.refresh())
        await asyncio.sleep(0.05)
        catalog.snapshot = snapshot
        await catalog.load("b", "/b", replace=False)
        following = asyncio.create_task(view.follow())
        await asyncio.sleep(0.05)
        is_sent.set()
        await refreshing
        following.cancel()
        assert set(view.records) == {"a", "b"}

    asyncio.run(run())


def test_it_outlives_a_catalog_that_fails(monkeypatch):
    monkeypatch.setattr("app.catalog_view.RETRY_S", 0.01)

    async def run():
        catalog = FakeCatalog("a")
        wait, num_calls = catalog.wait_for_change, 0

        async def failing(revision, timeout_s):
            nonlocal num_calls
            num_calls += 1
            if num_calls <= 2:
                raise ConnectionError("the catalog is restarting")
            return await wait(revision, timeout_s)

        catalog.wait_for_change = failing
        view = CatalogView(catalog)
        following = asyncio.create_task(view.follow())
        await asyncio.sleep(0.2)
        following.cancel()
        assert set(view.records) == {"a"}

    asyncio.run(run())
