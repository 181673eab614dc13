"""The host store of one node at work: packs what is asked for or registered, ends what is over.

Owns when adapters are read, packed and removed, and when the store has no more users. It wraps
`HostStore` in asyncio and knows no Ray: `store.actor` makes an actor of it.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

from app.registry.follower import RegistryReader, follow_registry
from app.registry.registry import RegistrySnapshot
from app.registry.state import AdapterRecord
from app.store.memory import HostStore, StoreStats
from app.store.process_watch import ProcessWatch
from slora_core.adapters.peft_weights import read_peft_adapter
from slora_core.adapters.slab_format import AdapterLocation
from slora_core.errors import AdapterNotFoundError, InvalidAdapterError, SLoRAError, StoreFullError

logger = logging.getLogger(__name__)

# How often a lease may find its adapter evicted again by others before it gives up.
MAX_LEASE_ATTEMPTS = 5


class NodeStore:
    """One node's store. Every method must be called on the loop that ran `start`.

    Clients are the processes that the store is there for; when none has lived for `grace_s`,
    `on_unused` is called, once.
    """

    def __init__(
        self,
        store: HostStore,
        registry: RegistryReader,
        grace_s: float,
        on_unused: Callable[[], None],
    ) -> None:
        self._store = store
        self._registry = registry
        self._grace_s = grace_s
        self._on_unused = on_unused
        self._clients = ProcessWatch()
        self._client_ended: dict[int, asyncio.Event] = {}
        self._packing: dict[str, asyncio.Task[None]] = {}
        self._records: Mapping[str, AdapterRecord] = {}
        self._revision = -1
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._end_timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._store.holder_fileno(), self._end_leases_of_the_dead)
        loop.add_reader(self._clients.fileno(), self._forget_dead_clients)
        self._tasks = [
            asyncio.create_task(follow_registry(self._registry, self._take_snapshot)),
            asyncio.create_task(self._pack_registered()),
        ]
        # Nobody may ever attach: whoever made the store may be dead by now.
        self._end_timer = loop.call_later(self._grace_s, self._end)

    def close(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._store.holder_fileno())
        loop.remove_reader(self._clients.fileno())
        self._cancel_end()
        for task in (*self._tasks, *self._packing.values()):
            task.cancel()
        self._clients.close()
        self._store.close()

    async def attach(self, client_pid: int) -> None:
        """Keep the store for this process; returns when the process has ended.

        Raises:
            ProcessLookupError: there is no such process.
        """
        self._clients.add(client_pid)
        self._cancel_end()
        await self._client_ended.setdefault(client_pid, asyncio.Event()).wait()

    async def lease(self, record: AdapterRecord, holder_pid: int) -> AdapterLocation:
        """Pin an adapter for a process, packing it first where it is not in the store.

        Raises:
            InvalidAdapterError: its files are not what they were when it was registered.
            StoreFullError: no room beside what is leased.
            ProcessLookupError: there is no such process.
        """
        for _ in range(MAX_LEASE_ATTEMPTS):
            try:
                return self._store.lease(record.adapter_id, holder_pid)
            except AdapterNotFoundError:
                await self._pack_once(record)
        raise StoreFullError(
            f"adapter {record.name!r} was evicted {MAX_LEASE_ATTEMPTS} times before it could be "
            "leased; the store is too small for what is asked of it at once"
        )

    def release(self, adapter_id: str, holder_pid: int, token: str | None = None) -> bool:
        """End a lease; see `HostStore.release`."""
        return self._store.release(adapter_id, holder_pid, token)

    def stats(self) -> StoreStats:
        return self._store.stats()

    def check_integrity(self) -> None:
        """Raises AssertionError if ranges or leases do not add up."""
        self._store.check_integrity()

    async def _pack_once(self, record: AdapterRecord) -> None:
        """Pack an adapter; calls for the same one share one reading of its files."""
        task = self._packing.get(record.adapter_id)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._pack, record, True))
            self._packing[record.adapter_id] = task
            task.add_done_callback(lambda _: self._packing.pop(record.adapter_id, None))
        # A caller that leaves must not take the others' task with it.
        await asyncio.shield(task)

    def _pack(self, record: AdapterRecord, evict: bool) -> None:
        summary, weights = read_peft_adapter(record.path, self._store.geometry)
        if summary.adapter_id != record.adapter_id:
            raise InvalidAdapterError(
                f"the files of adapter {record.name!r} in {record.path} have changed since "
                f"version {record.version} was loaded; load it again in place"
            )
        self._store.put(record.adapter_id, summary.layout, weights, evict)

    def _take_snapshot(self, snapshot: RegistrySnapshot) -> None:
        self._records = snapshot.records
        if snapshot.revision != self._revision:
            self._revision = snapshot.revision
            self._news.set()
        # At every answer, since a late lease may have packed what was unloaded before it.
        registered = {record.adapter_id for record in self._records.values()}
        for adapter_id in set(self._store.adapter_ids()) - registered:
            self._store.remove(adapter_id)

    async def _pack_registered(self) -> None:
        """Pack registered adapters ahead of requests, while there is free room, until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._pack_missing()
            except StoreFullError as error:
                logger.info("not every registered adapter is in the host store: %s", error)

    async def _pack_missing(self) -> None:
        tried: set[str] = set()
        # The registrations may change during each packing.
        while missing := self._next_missing(tried):
            tried.add(missing.adapter_id)
            try:
                await asyncio.to_thread(self._pack, missing, False)
            except StoreFullError:
                raise
            except SLoRAError as error:
                logger.warning("adapter %s is not packed: %s", missing.name, error)
            except Exception:
                # A disk that fails or no memory is no reason to give the others up.
                logger.exception("adapter %s is not packed", missing.name)
        logger.info("the host store has %s", self._store.stats())

    def _next_missing(self, tried: set[str]) -> AdapterRecord | None:
        done = tried.union(self._store.adapter_ids())
        records = self._records.values()
        return next((record for record in records if record.adapter_id not in done), None)

    def _end_leases_of_the_dead(self) -> None:
        for pid in self._store.dead_holders():
            ended = self._store.drop_holder(pid)
            logger.info("process %s ended; its %s leases are over", pid, ended)

    def _forget_dead_clients(self) -> None:
        for pid in self._clients.dead():
            self._clients.remove(pid)
            self._client_ended.pop(pid).set()
        if not self._client_ended and self._end_timer is None:
            # A replica that died is replaced within a few seconds.
            loop = asyncio.get_running_loop()
            self._end_timer = loop.call_later(self._grace_s, self._end)

    def _cancel_end(self) -> None:
        if self._end_timer is not None:
            self._end_timer.cancel()
            self._end_timer = None

    def _end(self) -> None:
        logger.info("no process has used the host store for %s s", self._grace_s)
        self._on_unused()
