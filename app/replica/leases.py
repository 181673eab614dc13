"""Store leases of one engine replica: held while an adapter has running requests.

Owns the count of requests for each adapter and the order around a lease: once it is granted the
engine is told where the pages lie; at its end the engine lets go of them first, and of its copy
where the adapter was unloaded; then the store gets its lease back. It knows no HTTP and no tokens.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from app.registry.state import AdapterRecord
from slora_core.adapters.slab_format import AdapterLocation
from slora_core.errors import EngineDeadError, StoreGoneError

logger = logging.getLogger(__name__)


class Store(Protocol):
    """What leases need of `store.client.StoreClient`."""

    async def lease(self, record: AdapterRecord, holder_pid: int) -> AdapterLocation: ...

    async def release(self, adapter_id: str, holder_pid: int) -> None: ...


class AdapterReader(Protocol):
    """What leases need of `engine.process.AsyncEngine`."""

    def add_adapter(self, location: AdapterLocation) -> None: ...

    async def release_adapter_source(self, adapter_id: str) -> None: ...

    def drop_adapter(self, adapter_id: str) -> None: ...


@dataclass
class _Entry:
    num_users: int = 0
    # The lease asked for or granted; a task, so that a request that leaves does not lose it.
    lease: "asyncio.Task[None] | None" = None
    # Held while the store is asked: a lease is granted only after the one before was given back.
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class AdapterLeases:
    """Leases in the name of `holder_pid`, the engine process that maps the store's memory.

    `is_registered` tells whether any name means an adapter (still).
    """

    def __init__(
        self,
        store: Store,
        engine: AdapterReader,
        holder_pid: int,
        is_registered: Callable[[str], bool],
    ) -> None:
        self._store = store
        self._engine = engine
        self._holder_pid = holder_pid
        self._is_registered = is_registered
        self._entries: dict[str, _Entry] = {}
        self._releases: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def hold(self, record: AdapterRecord) -> AsyncIterator[None]:
        """Keep the adapter leased, and known to the engine, for one request.

        A StoreGoneError of the caller has the lease replaced for those that come after it.

        Raises:
            AdapterUnavailableError, StoreFullError, StoreGoneError: as the store has it.
            EngineDeadError: there is nobody to lease it for.
        """
        entry = self._entries.setdefault(record.adapter_id, _Entry())
        entry.num_users += 1
        if entry.lease is None or _has_failed(entry.lease):
            entry.lease = asyncio.create_task(self._acquire(entry, record))
        lease = entry.lease
        try:
            await asyncio.shield(lease)
            yield
        except StoreGoneError:
            if entry.lease is lease and not _has_failed(lease):
                entry.lease = asyncio.create_task(self._replace(entry, record))
            raise
        finally:
            entry.num_users -= 1
            if entry.num_users == 0:
                self._start(self._release(record.adapter_id, entry))

    async def _acquire(self, entry: _Entry, record: AdapterRecord) -> None:
        async with entry.lock:
            await self._lease(record)

    async def _replace(self, entry: _Entry, record: AdapterRecord) -> None:
        """A new lease instead of one whose store ended before the engine had opened it."""
        async with entry.lock:
            await self._end_lease(record.adapter_id)
            await self._lease(record)

    async def _lease(self, record: AdapterRecord) -> None:
        try:
            location = await self._store.lease(record, self._holder_pid)
        except ProcessLookupError as error:
            # The store has seen it before the engine's owner did.
            raise EngineDeadError("the engine process ended") from error
        # On one connection with the requests that wait for it, and before them.
        self._engine.add_adapter(location)

    async def _release(self, adapter_id: str, entry: _Entry) -> None:
        if entry.lease is not None:
            await asyncio.wait({entry.lease})
        async with entry.lock:
            # A lease that is still asked for has a release of its own, which waits for it.
            if entry.num_users > 0 or (entry.lease is not None and not entry.lease.done()):
                return
            lease, entry.lease = entry.lease, None
            try:
                if lease is not None and not _has_failed(lease):
                    await self._give_back(adapter_id)
            finally:
                # Where a request came meanwhile, and be it gone again, its own lease waits for the
                # lock: that one's release forgets the entry.
                is_over = entry.num_users == 0 and entry.lease is None
                if is_over and self._entries.get(adapter_id) is entry:
                    del self._entries[adapter_id]

    async def _give_back(self, adapter_id: str) -> None:
        try:
            await self._engine.release_adapter_source(adapter_id)
        except EngineDeadError:
            logger.debug("the engine is dead and reads nothing any more")
        if not self._is_registered(adapter_id):
            # When it was unloaded, the engine may have had none of it yet: its requests waited.
            self._engine.drop_adapter(adapter_id)
        await self._end_lease(adapter_id)

    async def _end_lease(self, adapter_id: str) -> None:
        try:
            await self._store.release(adapter_id, self._holder_pid)
        except Exception:
            # The store frees the leases of a process that has ended, so this one is not lost.
            logger.exception("the lease of adapter %s was not given back", adapter_id)

    def _start(self, release: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(release)
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)


def _has_failed(lease: "asyncio.Task[None]") -> bool:
    return lease.done() and (lease.cancelled() or lease.exception() is not None)
