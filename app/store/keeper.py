"""Keeps registered adapters: in the slab while there is room, and on the node's disk.

Owns which adapters are brought ahead of requests, and in what order: what was loaded last goes
first, so that its own files need to stay for moments only. `NodeStore` tells it of registrations
and leases and runs it on its loop; the work is done in threads, one adapter at a time, and evicts
nothing from the slab.
"""

import asyncio
import logging
import mmap
import time
from collections.abc import Mapping

from app.byte_budget import ByteBudget
from app.heap import give_memory_back
from app.registry.state import AdapterRecord
from app.store.adapter_sources import AdapterSources, UnavailableLog
from app.store.memory import HostStore
from app.store.packed_files import PackedFiles
from slora_core.adapters.page_layout import AdapterLayout, LoraWeights, ModuleKey, pack_adapter
from slora_core.adapters.slab_format import view_pages
from slora_core.errors import AdapterUnavailableError, SLoRAError, StoreFullError

logger = logging.getLogger(__name__)

# Seconds after which what is missing is looked for again: files that came back, a cache that was
# emptied. The registry's long poll wakes the keeper as often.
RECHECK_S = 10.0

# Seconds that the packed file of an adapter which was unloaded or replaced stays after its last
# lease: where its engine has ended, a request that runs on it goes on in another one, and looks for
# that as long by default (`failover_timeout_s`).
STAYS_S = 120.0


class Keeper:
    """Every method but `run` returns at once; call them on the loop that runs it."""

    def __init__(
        self,
        host: HostStore,
        files: PackedFiles,
        sources: AdapterSources,
        budget: ByteBudget,
        unavailable: UnavailableLog,
    ) -> None:
        self._host = host
        self._files = files
        self._sources = sources
        self._budget = budget
        self._unavailable = unavailable
        # By adapter id; `add` and `remove` change it.
        self.registered: dict[str, AdapterRecord] = {}
        # Last taken first.
        self._pending: dict[str, AdapterRecord] = {}
        # Was registered; until when its packed file stays though nobody uses it, monotonic seconds.
        self._gone: dict[str, float] = {}
        # Of leases since the last look, seconds since the epoch.
        self._used_at: dict[str, float] = {}
        self._news = asyncio.Event()
        self._recheck_at = time.monotonic() + RECHECK_S
        self._slab_is_full = False
        self._disk_is_full = False
        self._has_told_of_limit = False

    def add(self, record: AdapterRecord) -> None:
        """An adapter is registered, or its record is another one now."""
        self.registered[record.adapter_id] = record
        self._gone.pop(record.adapter_id, None)
        self._disk_is_full = False
        self._ask_for(record)

    def remove(self, adapter_id: str) -> None:
        """An adapter is registered no more."""
        if self.registered.pop(adapter_id, None) is not None:
            self._pending.pop(adapter_id, None)
            self._used_at.pop(adapter_id, None)
            self._sources.forget(adapter_id)
            self._gone[adapter_id] = 0.0
            self._slab_is_full = self._disk_is_full = False

    def used(self, record: AdapterRecord, is_from_files: bool) -> None:
        """An adapter was leased, and had to be packed from its own files for that."""
        if record.adapter_id in self.registered:
            self._used_at[record.adapter_id] = time.time()
            if is_from_files and self._files.is_on:
                self._disk_is_full = False
                self._ask_for(record)

    def wake(self) -> None:
        """Look after what is to be done; to be called every few seconds, and after `remove`."""
        self._news.set()

    async def run(self) -> None:
        """Keep what is registered until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._look_after_all()
            except Exception:
                logger.exception("registered adapters are not looked after; trying on")

    async def _look_after_all(self) -> None:
        await self._keep_pending()
        await asyncio.to_thread(self._delete_files_of_the_gone)
        if time.monotonic() >= self._recheck_at:
            self._recheck_at = time.monotonic() + RECHECK_S
            await self._look_for_missing()
            await self._keep_pending()
            # Of what was packed and read since.
            await asyncio.to_thread(give_memory_back)

    def _ask_for(self, record: AdapterRecord) -> None:
        # Taken out first, or it would keep its old place.
        self._pending.pop(record.adapter_id, None)
        self._pending[record.adapter_id] = record
        self._news.set()

    async def _keep_pending(self) -> None:
        num_kept = 0
        # Registrations may come and go during each.
        while self._pending:
            _, record = self._pending.popitem()
            if self._slab_is_full and self._disk_is_full:
                continue
            num_kept += 1
            try:
                async with self._budget.taken(record.nbytes):
                    await asyncio.to_thread(self._keep, record)
            except AdapterUnavailableError as error:
                self._unavailable.tell(record, error)
            except SLoRAError as error:
                logger.warning("adapter %s is not packed: %s", record.name, error)
            except Exception:
                # A disk that fails or no memory is no reason to give the others up.
                logger.exception("adapter %s is not packed", record.name)
        if num_kept > 1:
            logger.info("looked after %s adapters; the host store has %s", num_kept, self._stats())

    def _stats(self) -> str:
        return f"{self._host.stats()}, the disk {self._files.num_files} packed adapters"

    def _keep(self, record: AdapterRecord) -> None:
        """Bring one adapter where it is not yet; in a thread."""
        adapter_id = record.adapter_id
        if adapter_id in self._files and (
            self._slab_is_full or adapter_id in self._host or self._fill_from_file(adapter_id)
        ):
            return
        is_to_be_filed = self._has_room_on_disk(record)
        if adapter_id not in self._host:
            if self._slab_is_full and not is_to_be_filed:
                return
            layout, weights = self._sources.read_files(record)
            if not self._put(adapter_id, layout, weights):
                if is_to_be_filed:
                    self._write(record, layout, self._packed(layout, weights))
                return
        if is_to_be_filed:
            with self._host.pinned(adapter_id) as pinned:
                if pinned is not None:
                    self._write(record, *pinned)

    def _fill_from_file(self, adapter_id: str) -> bool:
        """Whether there is a whole file, be there room in the slab or not."""
        try:
            return self._sources.from_packed_file(adapter_id, evict=False)
        except StoreFullError as error:
            self._note_full_slab(error)
            return True

    def _put(
        self, adapter_id: str, layout: AdapterLayout, weights: Mapping[ModuleKey, LoraWeights]
    ) -> bool:
        """Pack an adapter into the slab; false where there is no room."""
        if not self._slab_is_full:
            try:
                self._host.put(adapter_id, layout, weights, evict=False)
                return True
            except StoreFullError as error:
                self._note_full_slab(error)
        return False

    def _note_full_slab(self, error: StoreFullError) -> None:
        self._slab_is_full = True
        logger.info("not every registered adapter is in the host store: %s", error)

    def _packed(
        self, layout: AdapterLayout, weights: Mapping[ModuleKey, LoraWeights]
    ) -> memoryview:
        """An adapter in memory that goes back to the system with the last view of it."""
        geometry = self._host.geometry
        memory = memoryview(mmap.mmap(-1, layout.num_pages * geometry.page_bytes))
        pack_adapter(geometry, layout, weights, out=view_pages(geometry, layout, memory))
        return memory

    def _has_room_on_disk(self, record: AdapterRecord) -> bool:
        if not self._disk_is_full:
            self._disk_is_full = not self._files.has_room(
                record.nbytes, self._last_use(record), self.registered
            )
            if self._disk_is_full and self._files.is_on and not self._has_told_of_limit:
                self._has_told_of_limit = True
                logger.warning(
                    "adapter %s and maybe others are not kept on disk, beside %.1f GiB of packed "
                    "adapters that were used later: they are lost with their own files",
                    record.name,
                    self._files.nbytes / 2**30,
                )
        return not self._disk_is_full

    def _write(self, record: AdapterRecord, layout: AdapterLayout, pages: memoryview) -> None:
        is_written = self._files.write(
            record.adapter_id, layout, pages, self._last_use(record), self.registered
        )
        self._disk_is_full = self._disk_is_full or not is_written

    def _last_use(self, record: AdapterRecord) -> float:
        return max(record.loaded_at, self._used_at.get(record.adapter_id, 0.0))

    def _delete_files_of_the_gone(self) -> None:
        now = time.monotonic()
        for adapter_id, stays_until in list(self._gone.items()):
            if adapter_id in self._host:
                self._gone[adapter_id] = now + STAYS_S
            elif now >= stays_until:
                self._files.remove(adapter_id)
                self._gone.pop(adapter_id, None)

    async def _look_for_missing(self) -> None:
        used_at, self._used_at = self._used_at, {}
        self._disk_is_full = False
        records = sorted(self.registered.values(), key=lambda record: record.loaded_at)
        missing = await asyncio.to_thread(self._missing, records, used_at)
        for record in missing:
            if record.adapter_id in self.registered:
                self._pending.setdefault(record.adapter_id, record)

    def _missing(
        self, records: list[AdapterRecord], used_at: Mapping[str, float]
    ) -> list[AdapterRecord]:
        for adapter_id, at in used_at.items():
            self._files.used(adapter_id, at)
        self._files.expect_changes()
        in_slab = set(self._host.adapter_ids())
        return [
            record
            for record in records
            if (self._files.is_on and record.adapter_id not in self._files)
            or (record.adapter_id not in in_slab and not self._slab_is_full)
        ]
