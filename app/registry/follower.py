"""A local copy of the adapter registry, kept fresh by its long poll.

Owns the following of the registry and one process's view of which name means which adapter. It
changes nothing in the registry; the ingress resolves names with it, the replica learns from it
which adapters are gone, and the node's store follows the registry with it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import NoReturn, Protocol

from app.registry.registry import RegistrySnapshot
from app.registry.state import AdapterRecord
from slora_core.errors import AdapterNotFoundError

logger = logging.getLogger(__name__)

# Seconds a long poll waits in the registry, and the pause after a failed one.
POLL_S = 10.0
RETRY_S = 1.0


class RegistryReader(Protocol):
    """What following and the view need of the registry."""

    async def snapshot(self) -> RegistrySnapshot: ...

    async def wait_for_change(self, revision: int, timeout_s: float) -> RegistrySnapshot: ...


async def follow_registry(
    registry: RegistryReader, on_snapshot: Callable[[RegistrySnapshot], None]
) -> NoReturn:
    """Hand over every answer of the long poll, one at least every `POLL_S`, until cancelled.

    It outlives a registry that restarts; where `on_snapshot` raises, the snapshot comes once more.
    """
    revision = -1
    is_going = True
    while True:
        try:
            snapshot = await registry.wait_for_change(revision, POLL_S)
            on_snapshot(snapshot)
        except Exception:
            # Told once for a registry that is away for a while.
            if is_going:
                logger.warning("the adapter registry is not followed; trying on", exc_info=True)
            is_going = False
            await asyncio.sleep(RETRY_S)
        else:
            is_going = True
            revision = snapshot.revision


class RegistryView:
    """`refresh` or `follow` must have run once before names resolve without asking the registry.

    `on_gone` is called with the adapter ids that no name means any more, `on_snapshot` with every
    snapshot, one at least every `POLL_S`.
    """

    def __init__(
        self,
        registry: RegistryReader,
        on_gone: Callable[[frozenset[str]], None] | None = None,
        on_snapshot: Callable[[RegistrySnapshot], None] | None = None,
    ) -> None:
        self._registry = registry
        self._on_gone = on_gone
        self._on_snapshot = on_snapshot
        # Pages of the smallest engine's pool; None until an engine has told.
        self.num_pool_pages: int | None = None
        self._revision = -1
        self._records: Mapping[str, AdapterRecord] = {}
        self._adapter_ids: frozenset[str] = frozenset()
        self._refreshing = asyncio.Lock()
        # When the last refresh that has ended began.
        self._refreshed_at = -1.0

    @property
    def records(self) -> Mapping[str, AdapterRecord]:
        return self._records

    def has_id(self, adapter_id: str) -> bool:
        """Whether any name means the adapter."""
        return adapter_id in self._adapter_ids

    async def find(self, name: str) -> AdapterRecord:
        """The adapter a name means; a name unknown here is looked up in the registry.

        Raises:
            AdapterNotFoundError: the registry does not know it either.
        """
        if name not in self._records:
            await self.refresh()
        if name not in self._records:
            raise AdapterNotFoundError(f"the model {name!r} does not exist")
        return self._records[name]

    async def refresh(self) -> None:
        """Take a snapshot no older than this call; calls made at once share one."""
        asked_at = time.monotonic()
        async with self._refreshing:
            if self._refreshed_at < asked_at:
                began_at = time.monotonic()
                self._apply(await self._registry.snapshot())
                self._refreshed_at = began_at

    async def follow(self) -> None:
        """Keep the copy fresh until cancelled."""
        await follow_registry(self._registry, self._apply)

    def _apply(self, snapshot: RegistrySnapshot) -> None:
        if snapshot.revision < self._revision:
            # A refresh and the long poll at once; the other one's answer was newer.
            return
        old_ids = self._adapter_ids
        self._records = snapshot.records
        self._adapter_ids = frozenset(record.adapter_id for record in self._records.values())
        self._revision = snapshot.revision
        self.num_pool_pages = snapshot.num_pool_pages
        gone = old_ids - self._adapter_ids
        if gone and self._on_gone is not None:
            self._on_gone(gone)
        if self._on_snapshot is not None:
            self._on_snapshot(snapshot)
