import asyncio
import random

import pytest

from app.replica.leases import AdapterLeases
from slora_core.errors import EngineDeadError, StoreFullError, StoreGoneError
from tests.app.fakes import make_record

PID = 77


class FakeStoreAndEngine:
    """Checks the order of calls: lease, the engine is told, it lets go, release, nothing twice."""

    def __init__(self, delay_s=0.005):
        self.delay_s = delay_s
        self.leased = set()
        # What the engine was told of since the adapter was leased.
        self.known = set()
        self.unloaded = set()
        self.log = []
        self.error = None
        self.engine_error = None

    async def lease(self, record, holder_pid):
        assert holder_pid == PID and record.adapter_id not in self.leased
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        self.leased.add(record.adapter_id)
        self.log.append("lease")
        return f"location of {record.adapter_id}"

    def add_adapter(self, location):
        adapter_id = location.removeprefix("location of ")
        assert adapter_id in self.leased
        self.known.add(adapter_id)

    async def release_adapter_source(self, adapter_id):
        assert adapter_id in self.leased
        self.known.discard(adapter_id)
        await asyncio.sleep(self.delay_s)
        self.log.append("let go")
        if self.engine_error is not None:
            raise self.engine_error

    def drop_adapter(self, adapter_id):
        self.log.append("drop")

    def is_registered(self, adapter_id):
        return adapter_id not in self.unloaded

    async def release(self, adapter_id, holder_pid):
        assert holder_pid == PID
        await asyncio.sleep(self.delay_s)
        self.leased.remove(adapter_id)
        self.log.append("release")


def run(work, **fake):
    async def main():
        both = FakeStoreAndEngine(**fake)
        leases = AdapterLeases(both, both, PID, both.is_registered)
        await work(both, leases)
        while leases._releases:
            await asyncio.gather(*leases._releases)
        assert both.leased == set()
        assert leases._entries == {}
        return both.log

    return asyncio.run(main())


async def use(leases, name="a", hold_s=0.0, error=None):
    record = make_record(name)
    async with leases.hold(record):
        assert record.adapter_id in leases._engine.known
        await asyncio.sleep(hold_s)
        assert record.adapter_id in leases._engine.known
        if error is not None:
            raise error


def test_one_lease_for_requests_at_once():
    async def work(both, leases):
        await asyncio.gather(*(use(leases, hold_s=0.01) for _ in range(5)))

    assert run(work) == ["lease", "let go", "release"]


def test_a_request_that_comes_while_the_lease_goes_back():
    async def work(both, leases):
        await use(leases)
        # The engine is letting go.
        await asyncio.sleep(0.002)
        await use(leases)

    assert run(work) == ["lease", "let go", "release"] * 2


def test_a_request_that_leaves_while_it_waits_loses_no_lease():
    async def work(both, leases):
        request = asyncio.create_task(use(leases))
        await asyncio.sleep(0.002)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)

    assert run(work) == ["lease", "let go", "release"]


def test_a_request_that_leaves_while_another_lease_goes_back():
    async def work(both, leases):
        await use(leases)
        # The engine is letting go; the next waits for that, and leaves.
        await asyncio.sleep(0.002)
        left = asyncio.create_task(use(leases))
        await asyncio.sleep(0.001)
        left.cancel()
        while "release" not in both.log:
            await asyncio.sleep(0)
        # The lease of the one that left is under way, and serves this one.
        await use(leases, hold_s=0.03)

    assert run(work) == ["lease", "let go", "release"] * 2


def test_a_refused_lease_fails_its_requests_and_is_asked_again():
    async def work(both, leases):
        both.error = StoreFullError("full")
        results = await asyncio.gather(use(leases), use(leases), return_exceptions=True)
        assert [type(result) for result in results] == [StoreFullError] * 2
        both.error = None
        await use(leases)

    assert run(work) == ["lease", "let go", "release"]


def test_a_location_that_leads_nowhere_is_replaced():
    async def work(both, leases):
        async with leases.hold(make_record("a")):
            results = await asyncio.gather(
                *(use(leases, error=StoreGoneError("gone")) for _ in range(2)),
                return_exceptions=True,
            )
            assert [type(result) for result in results] == [StoreGoneError] * 2
            await use(leases)

    assert run(work) == ["lease", "release", "lease", "let go", "release"]


def test_an_adapter_unloaded_while_requests_hold_it_is_dropped_after_the_last():
    async def work(both, leases):
        async with leases.hold(make_record("a")):
            waiting = asyncio.create_task(use(leases, hold_s=0.02))
            await asyncio.sleep(0.01)
            both.unloaded.add("a-v1")
        assert both.log == ["lease"]
        await waiting

    assert run(work) == ["lease", "let go", "drop", "release"]


def test_a_dead_engine_does_not_keep_the_lease():
    async def work(both, leases):
        both.engine_error = EngineDeadError("dead")
        await use(leases)

    assert run(work)[-1] == "release"


def test_an_engine_that_the_store_sees_dead_first():
    async def work(both, leases):
        both.error = ProcessLookupError(3, "No such process")
        with pytest.raises(EngineDeadError, match="the engine process ended"):
            await use(leases)

    assert run(work) == []


@pytest.mark.parametrize("seed", range(5))
def test_random_requests(seed):
    rng = random.Random(seed)

    async def request(leases):
        await asyncio.sleep(rng.random() * 0.05)
        error = StoreGoneError("gone") if rng.random() < 0.2 else None
        task = asyncio.create_task(use(leases, rng.choice("abc"), rng.random() * 0.01, error))
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.01)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def work(both, leases):
        await asyncio.gather(*(request(leases) for _ in range(100)))

    run(work, delay_s=0.002)
