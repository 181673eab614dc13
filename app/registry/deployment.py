"""The adapter registry as a Serve deployment.

Owns the long poll and where the registry's state lies; which adapters are registered is decided by
`app.registry.registry`. The ingress, the engine replicas and the stores call it.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayError

from app import ray_private
from app.args import SLoRAArgs
from app.models.geometry import adapter_geometry, base_text, registry_rules
from app.registry.client import NAMESPACE
from app.registry.inspector import AdapterInspector
from app.registry.pools import LivingPools
from app.registry.registry import AdapterRegistry, RegistrySnapshot
from app.registry.state import AdapterRecord, StateFile
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
        self._changed = asyncio.Event()
        with ended_by_failure():
            self._registry = await asyncio.to_thread(_open_registry, args, app_name)
        self._looking = asyncio.create_task(self._look_again())

    async def snapshot(self) -> RegistrySnapshot:
        return self._registry.snapshot()

    async def wait_for_change(self, revision: int, timeout_s: float) -> RegistrySnapshot:
        """The registrations, as soon as their revision is another one or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._registry.revision == revision:
                    await self._changed.wait()
        except TimeoutError:
            logger.debug("no change from revision %s in %s s", revision, timeout_s)
        return self._registry.snapshot()

    @returns_errors
    async def load(self, name: str, path: str, replace: bool = False) -> AdapterRecord:
        """Register an adapter directory; see `AdapterRegistry.load`."""
        return await self._change(lambda: self._registry.load(name, path, replace))

    @returns_errors
    async def unload(self, name: str) -> AdapterRecord:
        """Drop a registration; see `AdapterRegistry.unload`."""
        return await self._change(lambda: self._registry.unload(name))

    @returns_errors
    async def report_pool(self, replica_id: str, num_pages: int) -> None:
        """A living engine replica has a pool of this size."""
        await self._change(lambda: self._registry.report_pool(replica_id, num_pages))

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            try:
                await self._change(self._registry.look_again)
            except Exception:
                logger.exception("the registrations could not be looked at again")

    async def _change(self, change: Callable[[], T]) -> T:
        """Run a change in a thread and wake the polls, also where the caller has left."""
        task = asyncio.create_task(asyncio.to_thread(change))
        task.add_done_callback(self._announce)
        return await asyncio.shield(task)

    def _announce(self, task: "asyncio.Task[Any]") -> None:
        if not task.cancelled():
            # Looked at, so that asyncio does not warn where the caller has left.
            task.exception()
        self._changed.set()
        self._changed = asyncio.Event()


class ClusterState:
    """An application's entry in Ray's own key-value store, as `StateStore`.

    It is found from every node and ends with the cluster, so that a registry that dies takes up
    where it was, a new cluster starts afresh and nothing has to be cleaned up.
    """

    def __init__(self, app_name: str) -> None:
        self._key = f"registry:{app_name}"

    def read(self) -> bytes | None:
        return ray_private.read_from_cluster(NAMESPACE, self._key)

    def write(self, data: bytes) -> None:
        try:
            ray_private.write_to_cluster(NAMESPACE, self._key, data)
        except RayError as error:
            raise OSError(f"Ray's key-value store: {error}") from error


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
    if args.adapters_dir is not None:
        registry.scan(args.adapters_dir)
    logger.info("%s adapters are registered", len(registry.records()))
    return registry
