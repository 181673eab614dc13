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

from app.registry.changes import Position, RegistryChanges
from app.registry.registrations import Registrations
from app.registry.state import AdapterRecord
from app.remote_errors import is_actor_death
from slora_core.errors import AdapterNotFoundError

logger = logging.getLogger(__name__)

# Seconds a long poll waits in the registry, and the pause after a failed one.
POLL_S = 10.0
RETRY_S = 1.0


class RegistryReader(Protocol):
    """What following and the view need of the registry."""

    async def changes_since(self, position: Position | None) -> RegistryChanges: ...

    async def wait_for_change(
        self, position: Position | None, timeout_s: float
    ) -> RegistryChanges: ...


async def follow_registry(
    registry: RegistryReader,
    position: Callable[[], Position | None],
    on_changes: Callable[[RegistryChanges], object],
) -> NoReturn:
    """Hand over every answer of the long poll, one at least every `POLL_S`, until cancelled.

    `position` tells what is known. It outlives a registry that restarts; where `on_changes`
    raises, everything comes once more.
    """
    is_going = is_told = True
    while True:
        try:
            known = position() if is_told else None
            changes = await registry.wait_for_change(known, POLL_S)
            is_told = False
            on_changes(changes)
            is_told = True
        except Exception as error:
            # Told once for a registry that is away for a while.
            if is_going:
                logger.warning(
                    "the adapter registry is not followed; trying on",
                    exc_info=not is_actor_death(error),
                )
            is_going = False
            await asyncio.sleep(RETRY_S)
        else:
            is_going = True


class RegistryView:
    """`refresh` or `follow` must have run once before names resolve without asking the registry.

    `on_gone` is called with the adapter ids that no name means any more.
    """

    def __init__(
        self,
        registry: RegistryReader,
        on_gone: Callable[[frozenset[str]], None] | None = None,
    ) -> None:
        self._registry = registry
        self._on_gone = on_gone
        self._copy = Registrations()
        self._refreshing = asyncio.Lock()
        # When the last refresh that has ended began.
        self._refreshed_at = -1.0

    @property
    def records(self) -> Mapping[str, AdapterRecord]:
        """By name; it changes while others run."""
        return self._copy.records

    @property
    def num_pool_pages(self) -> int | None:
        """Pages of the smallest engine's pool; None until an engine has told."""
        return self._copy.num_pool_pages

    def has_id(self, adapter_id: str) -> bool:
        """Whether any name means the adapter."""
        return self._copy.has_id(adapter_id)

    async def find(self, name: str) -> AdapterRecord:
        """The adapter a name means; a name unknown here is looked up in the registry.

        Raises:
            AdapterNotFoundError: the registry does not know it either.
        """
        if name not in self.records:
            await self.refresh()
        if name not in self.records:
            raise AdapterNotFoundError(f"the model {name!r} does not exist")
        return self.records[name]

    async def refresh(self) -> None:
        """Learn all that had changed by this call; calls made at once share one."""
        asked_at = time.monotonic()
        async with self._refreshing:
            if self._refreshed_at < asked_at:
                began_at = time.monotonic()
                # An answer does not follow on the copy where the registry was replaced meanwhile.
                while not self._apply(await self._registry.changes_since(self._copy.position)):
                    pass
                self._refreshed_at = began_at

    async def follow(self) -> None:
        """Keep the copy fresh until cancelled."""
        await follow_registry(self._registry, lambda: self._copy.position, self._apply)

    def _apply(self, changes: RegistryChanges) -> bool:
        taken = self._copy.take(changes)
        if taken is not None and taken.gone and self._on_gone is not None:
            self._on_gone(taken.gone)
        return taken is not None
