"""The adapter registry as a Serve deployment.

Owns where its calls run and where its state lies; which adapters are registered is decided by
`app.registry.registry`. The ingress, the engine replicas and the stores call it.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ray import serve

from app import in_place
from app.args import SLoRAArgs
from app.heap import give_memory_back
from app.models.geometry import adapter_geometry, base_text, registry_rules
from app.registry.changes import Position, RegistryChanges
from app.registry.cluster_state import ClusterState
from app.registry.inspector import AdapterInspector
from app.registry.long_poll import LongPoll
from app.registry.pools import LivingPools
from app.registry.registry import AdapterRegistry
from app.registry.state import AdapterRecord
from app.registry.state_file import StateFile
from app.remote_errors import returns_errors
from app.serve_run import ended_by_failure

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds between two looks at files that are away and at which engines live.
LOOK_AGAIN_S = 10.0


class RegistryServer:
    """The one replica of the registry. Files are read in threads, so that polls are not held up."""

    async def __init__(self, args: SLoRAArgs) -> None:  # type: ignore[misc]
        app_name = serve.get_replica_context().app_name
        self._args = args
        self._poll = LongPoll()
        with ended_by_failure():
            self._registry = await asyncio.to_thread(_open_registry, args, app_name)
        self._looking = asyncio.create_task(self._look_again())

    async def reconfigure(self, changed: dict[str, Any]) -> None:
        """Called by Serve, also after the start; see `in_place.settings`."""
        args = in_place.with_settings(self._args, changed)
        if args != self._args:
            await self._change(lambda: _use_directories(self._registry, args))
            self._args = args

    async def changes_since(self, position: Position | None) -> RegistryChanges:
        """What has changed since a position, or everything."""
        return self._registry.changes_since(position)

    async def wait_for_change(self, position: Position | None, timeout_s: float) -> RegistryChanges:
        """What has changed since, as soon as anything has or after `timeout_s`."""
        await self._poll.wait(lambda: self._registry.position != position, timeout_s)
        return self._registry.changes_since(position)

    @returns_errors
    async def load(self, name: str, path: str, replace: bool = False) -> AdapterRecord:
        """Register an adapter directory; see `AdapterRegistry.load`."""
        # Here: a thread may take a while to begin.
        asked = self._registry.ask(name)
        return await self._change(lambda: self._registry.load(name, path, replace, asked))

    @returns_errors
    async def unload(self, name: str) -> AdapterRecord | None:
        """Drop a registration; see `AdapterRegistry.unload`."""
        asked = self._registry.ask(name)
        return await self._change(lambda: self._registry.unload(name, asked))

    @returns_errors
    async def report_pool(self, replica_id: str, num_pages: int) -> None:
        """A living engine replica has a pool of this size."""
        self._registry.report_pool(replica_id, num_pages)
        self._poll.announce()

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            try:
                await self._change(self._registry.look_again)
            except Exception:
                logger.exception("the registrations could not be looked at again")
            # Of loads since, each of which is too small to do it for.
            await asyncio.to_thread(give_memory_back)

    async def _change(self, change: Callable[[], T]) -> T:
        """Run a change in a thread and wake the polls, also where the caller has left."""
        task = asyncio.create_task(asyncio.to_thread(change))
        task.add_done_callback(self._announce)
        return await asyncio.shield(task)

    def _announce(self, task: "asyncio.Task[Any]") -> None:
        if not task.cancelled():
            # Looked at, so that asyncio does not warn where the caller has left.
            task.exception()
        self._poll.announce()


def _open_registry(args: SLoRAArgs, app_name: str) -> AdapterRegistry:
    path = args.registry_state_path
    engine = args.engine_config()
    inspector = AdapterInspector(
        adapter_geometry(args), args.adapter_roots, registry_rules(args), base_text(args)
    )
    registry = AdapterRegistry(
        inspector,
        LivingPools(None if engine.num_pool_tokens is None else engine.num_pages),
        ClusterState(app_name) if path is None else StateFile(Path(path)),
        {args.base_model_name},
    )
    _use_directories(registry, args)
    return registry


def _use_directories(registry: AdapterRegistry, args: SLoRAArgs) -> None:
    registry.use_directories(args.adapters_dir, args.adapter_roots)
    logger.info("%s adapters are registered", len(registry.records()))
