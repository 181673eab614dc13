"""Registry and store on a real Ray cluster: typed errors, restarts after kills, the end."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.adapters.slab_reader import SlabReader
from slora_core.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    AdapterPathError,
    AdapterUnavailableError,
    InvalidAdapterError,
    StoreGoneError,
)
from tests.app.fakes import make_record
from tests.app.ray_actors import kill_named_actor
from tests.factories import make_geometry, make_model, make_random_adapter

pytestmark = pytest.mark.serve

APP = "adapters"
ME = os.getpid()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapter_store")
    make_model(root / "model")
    for index in range(4):
        make_random_adapter(root / "adapters" / f"a{index}", root / "model", seed=index)
    make_random_adapter(root / "extra" / "new", root / "model", seed=9)
    make_random_adapter(root / "outside", root / "model", seed=10)
    return root


@pytest.fixture(scope="module")
def args(root: Path):
    from app.args import SLoRAArgs

    return SLoRAArgs(
        model=str(root / "model"),
        adapters_dir=str(root / "adapters"),
        allowed_adapter_roots=[str(root / "extra")],
        store_capacity_bytes=2**24,
        store_extent_bytes=2**22,
        packed_cache_dir=str(root / "packed"),
    )


@pytest.fixture(scope="module")
def registry_handle(ray_cluster, args):
    from ray import serve

    from app.registry.client import REGISTRY_DEPLOYMENT
    from app.registry.deployment import RegistryServer

    deployment = serve.deployment(RegistryServer).options(
        name=REGISTRY_DEPLOYMENT,
        max_ongoing_requests=100,
        graceful_shutdown_timeout_s=0.5,
        # By which a killed registry is missed.
        health_check_period_s=0.5,
        ray_actor_options={"num_cpus": 0.1},
    )
    serve.run(deployment.bind(args), name=APP, route_prefix=None)
    yield serve.get_deployment_handle(REGISTRY_DEPLOYMENT, APP)
    serve.delete(APP)


@pytest.fixture
def registry(registry_handle):
    from app.registry.client import RegistryClient

    return RegistryClient(registry_handle)


async def _until(condition, timeout_s=30):
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.05)


async def _holds(store, num_adapters: int) -> bool:
    return (await store.stats()).num_adapters == num_adapters


def test_typed_errors_cross_the_handle(registry, root) -> None:
    async def scenario():
        with pytest.raises(AdapterNotFoundError) as error:
            await registry.unload("nobody")
        assert type(error.value) is AdapterNotFoundError
        assert str(error.value) == "no adapter is named 'nobody'; loaded are a0, a1, a2, a3"
        with pytest.raises(AdapterExistsError):
            await registry.load("a0", str(root / "extra" / "new"))
        with pytest.raises(AdapterPathError):
            await registry.load("b", str(root / "outside"))
        with pytest.raises(InvalidAdapterError, match="not a directory"):
            await registry.load("b", "nowhere")

    asyncio.run(scenario())


def test_other_errors_stay_rays(registry_handle) -> None:
    from ray.exceptions import RayTaskError

    from app.remote_errors import result_of

    async def scenario():
        with pytest.raises(RayTaskError) as error:
            await result_of(registry_handle.load.remote())
        assert isinstance(error.value, TypeError)

    asyncio.run(scenario())


def test_the_long_poll_returns_at_a_change_or_in_time(registry) -> None:
    async def scenario():
        whole = await registry.changes_since(None)
        here = whole.position
        start = time.monotonic()
        assert await registry.wait_for_change(None, 30) == whole
        nothing = replace(whole, since=here, records={})
        assert await registry.wait_for_change(here, 0.3) == nothing
        assert 0.25 < time.monotonic() - start < 5
        polls = [asyncio.create_task(registry.wait_for_change(here, 30)) for _ in range(20)]
        await asyncio.sleep(0.2)
        record = await registry.load("polled", "new")
        for poll in polls:
            changed = await asyncio.wait_for(poll, 5)
            assert (changed.since, changed.records) == (here, {"polled": record})
        await registry.unload("polled")

    asyncio.run(scenario())


def test_registrations_survive_the_killed_registry(registry, registry_handle, root) -> None:
    import ray

    async def scenario():
        await registry.load("live", str(root / "extra" / "new"))
        await registry.unload("a3")
        before = await registry.changes_since(None)
        kill_named_actor(f"SERVE_REPLICA::{APP}#registry#")

        async def is_back():
            try:
                return (await registry.changes_since(before.position)).is_whole
            except Exception:
                return False

        await _until(is_back)
        after = await registry.changes_since(before.position)
        assert after.records == before.records and after.position.epoch != before.position.epoch
        session = ray.get_runtime_context().get_session_name()
        assert not list(Path(tempfile.gettempdir()).glob(f"slora*/{session}*"))
        await registry.unload("live")
        await registry.load("a3", str(root / "adapters" / "a3"))

    asyncio.run(scenario())


def test_the_store_packs_leases_and_follows_the_registry(registry, registry_handle, args, root):
    from app.store.client import StoreClient

    async def scenario():
        store, other = StoreClient(args, APP), StoreClient(args, APP)
        records = (await registry.changes_since(None)).records
        await _until(lambda: _holds(store, len(records)))
        reader = SlabReader(make_geometry(root / "model"))
        for record in records.values():
            location = await store.lease(record, ME)
            expected = load_packed_adapter(record.path, make_geometry(root / "model"))
            assert torch.equal(reader.open(location).pages, expected.pages)
        assert len(reader._mappings) == 1
        assert (await other.stats()).num_leases == len(records), "both reach one store"
        assert (await store.stats()).num_packs == len(records)

        await registry.load("later", "new")
        await _until(lambda: _holds(store, len(records) + 1))
        await registry.unload("later")
        await _until(lambda: _holds(store, len(records)))
        for record in records.values():
            await store.release(record.adapter_id, ME)
        assert (await store.stats()).num_leases == 0
        await store.check_integrity()
        await store.close()
        await other.close()

    asyncio.run(scenario())


def test_typed_errors_cross_the_stores_handle(registry, args) -> None:
    from app.store.client import StoreClient

    async def scenario():
        store = StoreClient(args, APP)
        record = (await registry.changes_since(None)).records["a0"]
        with pytest.raises(AdapterUnavailableError) as error:
            await store.lease(replace(record, adapter_id="another"), ME)
        assert type(error.value) is AdapterUnavailableError
        assert str(error.value).startswith("the files of adapter 'a0' in ")
        await store.close()

    asyncio.run(scenario())


def test_a_killed_store_comes_back_and_leases_go_on(registry, args, root) -> None:
    from app.store.client import StoreClient

    async def scenario():
        store = StoreClient(args, APP)
        record = (await registry.changes_since(None)).records["a0"]
        reader = SlabReader(make_geometry(root / "model"))
        old = await store.lease(record, ME)
        pages = reader.open(old).pages
        expected = pages.clone()
        os.kill(old.extent.pid, signal.SIGKILL)
        new = await store.lease(record, ME)
        assert new.extent.pid != old.extent.pid and new.extent.token != old.extent.token
        assert torch.equal(pages, expected), "the dead store's pages can be used to the end"
        assert torch.equal(reader.open(new).pages, expected)
        # The client is attached again, and the store filled, without being asked.
        await _until(lambda: _holds(store, 4))
        await store.release(record.adapter_id, ME)
        assert (await store.stats()).num_leases == 0
        await store.release(record.adapter_id, ME)
        await store.check_integrity()

        # Killed while idle: it comes back by itself.
        os.kill(new.extent.pid, signal.SIGKILL)
        await _until(lambda: _holds(store, 4))
        await store.close()

    asyncio.run(scenario())


def test_a_store_that_does_not_come_back(args, monkeypatch) -> None:
    from ray.exceptions import ActorDiedError

    from app.store import client as store_client

    class Method:
        def __init__(self, error=None):
            self.error = error
            self.num_calls = 0

        async def remote(self, *_):
            self.num_calls += 1
            if self.error is None:
                await asyncio.Event().wait()
            raise self.error

    class DeadStore:
        attach = Method()
        lease = Method(ActorDiedError())

    monkeypatch.setattr(store_client, "get_or_create_store", lambda spec: DeadStore)
    monkeypatch.setattr(store_client, "RETRY_S", 0.001)

    async def scenario():
        store = store_client.StoreClient(args, APP)
        with pytest.raises(StoreGoneError, match="does not come back"):
            await store.lease(make_record("a"), ME)
        assert DeadStore.lease.num_calls == store_client.MAX_CALL_ATTEMPTS
        await store.close()

    asyncio.run(scenario())


def test_a_killed_holders_leases_end(registry, args) -> None:
    from app.store.client import StoreClient

    async def scenario():
        store = StoreClient(args, APP)
        record = (await registry.changes_since(None)).records["a1"]
        holder = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        await store.lease(record, holder.pid)
        await store.lease(record, ME)
        holder.kill()
        holder.wait()

        async def one_is_left():
            return (await store.stats()).num_leases == 1

        await _until(one_is_left)
        await store.release(record.adapter_id, ME)
        await store.close()

    asyncio.run(scenario())


def test_the_store_ends_itself_when_nobody_uses_it(registry, args) -> None:
    import ray

    from app.registry.client import NAMESPACE
    from app.store.actor import StoreSpec
    from app.store.client import get_or_create_store

    spec = replace(StoreSpec.of(args, APP), grace_s=0.5)
    client = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    store = get_or_create_store(spec)
    attached = store.attach.remote(client.pid)
    pid = ray.get(store.pid.remote(), timeout=30)
    time.sleep(3 * spec.grace_s)
    assert ray.get(store.pid.remote(), timeout=5) == pid, "a client keeps it"
    client.kill()
    client.wait()
    ray.get(attached, timeout=10)
    deadline = time.monotonic() + 20
    name = spec.actor_name(ray.get_runtime_context().get_node_id())
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
    time.sleep(1)
    with pytest.raises(ValueError):
        ray.get_actor(name, NAMESPACE)
    # A later client has a new one made.
    again = get_or_create_store(spec)
    assert ray.get(again.pid.remote(), timeout=30) != pid
    ray.kill(again, no_restart=True)
