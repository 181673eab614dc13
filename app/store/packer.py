"""The host store of one node at work: brings what is asked for, ends what is over.

Owns leases and when the store has no more users; what is brought ahead of them is `keeper`'s. It
wraps `HostStore` in asyncio and knows no Ray: `store.actor` makes an actor of it.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from app.byte_budget import ByteBudget
from app.registry.changes import RegistryChanges
from app.registry.follower import POLL_S, RegistryReader, follow_registry
from app.registry.registrations import Registrations
from app.registry.state import AdapterRecord
from app.store.adapter_sources import AdapterSources, UnavailableLog
from app.store.keeper import Keeper
from app.store.memory import HostStore
from app.store.packed_files import PackedFiles
from app.store.process_watch import ProcessWatch
from app.store.stats import StoreStats
from slora_core.adapters.slab_format import AdapterLocation
from slora_core.errors import AdapterNotFoundError, AdapterUnavailableError, StoreFullError

logger = logging.getLogger(__name__)

# How often a lease may find its adapter evicted again by others before it gives up.
MAX_LEASE_ATTEMPTS = 5
# Of packed adapters that are made of their own files at one time; each takes two to three times
# its size for that. Half a gigabyte keeps every thread busy with adapters of a 7B model.
MAX_PACKING_BYTES = 1 << 29


class NodeStore:
    """One node's store. Every method must be called on the loop that ran `start`.

    Clients are the processes that the store is there for; when none has lived for `grace_s`,
    `on_unused` is called, once. `on_unavailable` is called for every lease of a registered adapter
    that nothing has the bytes of.
    """

    def __init__(
        self,
        store: HostStore,
        files: PackedFiles,
        registry: RegistryReader,
        grace_s: float,
        on_unused: Callable[[], None],
        on_unavailable: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._files = files
        self._sources = AdapterSources(store, files)
        self._budget = ByteBudget(MAX_PACKING_BYTES)
        self._unavailable = UnavailableLog()
        self._keeper = Keeper(store, files, self._sources, self._budget, self._unavailable)
        self._registry = registry
        self._grace_s = grace_s
        self._on_unused = on_unused
        self._on_unavailable = on_unavailable
        self._num_unavailable = 0
        self._clients = ProcessWatch()
        self._client_ended: dict[int, asyncio.Event] = {}
        self._bringing: dict[str, asyncio.Task[bool]] = {}
        self._registrations = Registrations()
        self._sweep_at = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._end_timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._store.holder_fileno(), self._end_leases_of_the_dead)
        loop.add_reader(self._clients.fileno(), self._forget_dead_clients)
        self._tasks = [
            asyncio.create_task(
                follow_registry(
                    self._registry, lambda: self._registrations.position, self._take_changes
                )
            ),
            asyncio.create_task(self._keep_registered()),
        ]
        # Nobody may ever attach: whoever made the store may be dead by now.
        self._end_timer = loop.call_later(self._grace_s, self._end)

    def close(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._store.holder_fileno())
        loop.remove_reader(self._clients.fileno())
        self._cancel_end()
        for task in (*self._tasks, *self._bringing.values()):
            task.cancel()
        self._clients.close()
        self._files.close()
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
        """Pin an adapter for a process, bringing it first where it is not in the store.

        Raises:
            AdapterUnavailableError: neither its own files nor a packed one are there any more.
            StoreFullError: no room beside what is leased.
            ProcessLookupError: there is no such process.
        """
        is_from_files = False
        for _ in range(MAX_LEASE_ATTEMPTS):
            try:
                location = self._store.lease(record.adapter_id, holder_pid)
            except AdapterNotFoundError:
                is_from_files = await self._bring_once(record)
            else:
                self._keeper.used(record, is_from_files)
                return location
        raise StoreFullError(
            f"adapter {record.name!r} was evicted {MAX_LEASE_ATTEMPTS} times before it could be "
            "leased; the store is too small for what is asked of it at once"
        )

    def release(self, adapter_id: str, holder_pid: int, token: str | None = None) -> bool:
        """End a lease; see `HostStore.release`."""
        return self._store.release(adapter_id, holder_pid, token)

    def stats(self) -> StoreStats:
        return replace(
            self._store.stats(),
            num_packed_files=self._files.num_files,
            packed_file_bytes=self._files.nbytes,
            num_disk_reads=self._sources.num_disk_reads,
            num_unavailable=self._num_unavailable,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if ranges or leases do not add up."""
        self._store.check_integrity()

    async def _bring_once(self, record: AdapterRecord) -> bool:
        """Bring an adapter, by its own files if true; calls for the same one share one reading."""
        task = self._bringing.get(record.adapter_id)
        if task is None:
            task = asyncio.create_task(self._bring(record))
            self._bringing[record.adapter_id] = task
            task.add_done_callback(lambda _: self._bringing.pop(record.adapter_id, None))
        try:
            # A caller that leaves must not take the others' task with it.
            return await asyncio.shield(task)
        except AdapterUnavailableError as error:
            # A request may be late, and its version replaced meanwhile: no loss to anybody.
            is_following = self._registrations.position is not None
            if not is_following or record.adapter_id in self._keeper.registered:
                self._num_unavailable += 1
                self._on_unavailable()
                self._unavailable.tell(record, error)
            raise

    async def _bring(self, record: AdapterRecord) -> bool:
        if await asyncio.to_thread(self._sources.from_packed_file, record.adapter_id, True):
            return False
        async with self._budget.taken(record.nbytes):
            await asyncio.to_thread(self._pack, record)
        return True

    def _pack(self, record: AdapterRecord) -> None:
        self._store.put(record.adapter_id, *self._sources.read_files(record))

    def _take_changes(self, changes: RegistryChanges) -> None:
        taken = self._registrations.take(changes)
        if taken is None:
            # The next answer begins where the copy is.
            return
        gone, news = taken.gone, taken.news
        if changes.is_whole:
            # Where the changes before could not be taken to their end, nobody knows which were.
            adapters = self._registrations.adapters()
            gone = frozenset(self._keeper.registered.keys() - adapters.keys())
            news = tuple(adapters.values())
            self._sweep_at = 0.0
        for adapter_id in gone:
            self._keeper.remove(adapter_id)
            self._store.remove(adapter_id)
        known = self._keeper.registered
        for record in sorted(news, key=lambda record: record.loaded_at):
            # The same content may be registered by another path now.
            if (old := known.get(record.adapter_id)) is None or old.path != record.path:
                self._keeper.add(record)
        self._sweep()
        self._keeper.wake()

    def _sweep(self) -> None:
        """Remove what is not registered: a late lease may have brought what was unloaded before."""
        now = asyncio.get_running_loop().time()
        if now >= self._sweep_at:
            for adapter_id in set(self._store.adapter_ids()) - self._keeper.registered.keys():
                self._store.remove(adapter_id)
            # Every poll that times out is one occasion.
            self._sweep_at = now + POLL_S / 2

    async def _keep_registered(self) -> None:
        await asyncio.to_thread(self._files.start)
        await self._keeper.run()

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
