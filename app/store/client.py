"""A process's side of its node's store: has it made, keeps it alive, leases from it."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from app.args import SLoRAArgs
from app.registry.client import NAMESPACE
from app.registry.state import AdapterRecord
from app.remote_errors import result_of
from app.store.actor import AdapterStoreActor, StoreSpec
from app.store.stats import StoreStats
from slora_core.adapters.slab_format import AdapterLocation
from slora_core.errors import StoreGoneError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A store that was killed is restarted by Ray, or made anew by its clients, in about 2 s; on a busy
# node it takes several times that.
MAX_CALL_ATTEMPTS = 8
RETRY_S = 0.5


def get_or_create_store(spec: StoreSpec) -> Any:
    """Handle of this node's store actor, made where there is none; blocks on Ray."""
    node_id = ray.get_runtime_context().get_node_id()
    options: dict[str, Any] = {
        "name": spec.actor_name(node_id),
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",
        "max_restarts": -1,
        "num_cpus": 0,
        # Ray's head would keep some kB for each of the last 100,000 leases.
        "enable_task_events": False,
        # The store's memory is only good for processes of its node.
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
    }
    return ray.remote(AdapterStoreActor).options(**options).remote(spec)


class StoreClient:
    """This process's side of its node's store; make it on a running event loop.

    It keeps the store alive and, where it was killed, has it made and filled again at once.
    `app_name` is the Serve application's; None asks Serve.
    """

    def __init__(self, args: SLoRAArgs, app_name: str | None = None) -> None:
        if app_name is None:
            app_name = serve.get_replica_context().app_name
        self._spec = StoreSpec.of(args, app_name)
        self._handle: Any = None
        self._connecting = asyncio.Lock()
        # Extent tokens of the leases held, by (adapter id, holder pid).
        self._tokens: dict[tuple[str, int], list[str]] = {}
        self._attaching = asyncio.create_task(self._stay_attached())

    async def lease(self, record: AdapterRecord, holder_pid: int) -> AdapterLocation:
        """Pin an adapter for a process of this node until `release` or the process's end.

        Raises:
            AdapterUnavailableError: nothing has the adapter's bytes any more.
            StoreFullError: no room beside what is leased.
            StoreGoneError: the store ended and does not come back.
        """
        location: AdapterLocation = await self._call(
            lambda store: store.lease.remote(record, holder_pid)
        )
        tokens = self._tokens.setdefault((record.adapter_id, holder_pid), [])
        tokens.append(location.extent.token)
        return location

    async def release(self, adapter_id: str, holder_pid: int) -> None:
        """Give one lease back; one that a killed store took with it is forgotten."""
        tokens = self._tokens.get((adapter_id, holder_pid))
        if not tokens:
            return
        token = tokens.pop()
        if not tokens:
            del self._tokens[adapter_id, holder_pid]
        await self._call(lambda store: store.release.remote(adapter_id, holder_pid, token))

    async def stats(self) -> StoreStats:
        return await self._call(lambda store: store.stats.remote())

    async def check_integrity(self) -> None:
        await self._call(lambda store: store.check_integrity.remote())

    async def close(self) -> None:
        """Stop keeping the store for this process; its leases end with their processes."""
        self._attaching.cancel()
        await asyncio.wait({self._attaching})

    async def _call(self, call: Callable[[Any], Awaitable[T]]) -> T:
        """Call the store, again where it was killed meanwhile."""
        for attempt in range(MAX_CALL_ATTEMPTS):
            try:
                return await result_of(call(await self._connect()))
            except RayTaskError:
                # The store itself raised it; only the store's death is worth another try.
                raise
            except RayActorError as error:
                logger.warning("the adapter store did not answer: %r; trying again", error)
                self._handle = None
                await asyncio.sleep(RETRY_S * attempt)
        raise StoreGoneError("the node's adapter store does not come back; try again later")

    async def _connect(self) -> Any:
        async with self._connecting:
            if self._handle is None:
                # Ray looks the name up in another process.
                self._handle = await asyncio.to_thread(get_or_create_store, self._spec)
            return self._handle

    async def _stay_attached(self) -> None:
        while True:
            try:
                # Returns only where the store ends.
                await result_of((await self._connect()).attach.remote(os.getpid()))
            except Exception as error:
                logger.warning("the adapter store ended: %r; attaching again", error)
                self._handle = None
            await asyncio.sleep(RETRY_S)
