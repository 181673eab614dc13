"""The store actor of a node.

Owns the actor's name, what it is made with and its end. What a store does is `NodeStore`'s.
The actor is detached, so that it outlives the replica that made it, and ends itself once no
replica on its node has lived for a while: nothing is left after `serve shutdown`.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.metrics import Counter

from app import ray_private
from app.args import SLoRAArgs
from app.models.demo import default_cache_dir
from app.models.geometry import adapter_geometry
from app.registry.client import REGISTRY_DEPLOYMENT, RegistryClient
from app.registry.state import AdapterRecord
from app.remote_errors import returns_errors
from app.store.memory import HostStore
from app.store.packed_files import PackedFiles
from app.store.packer import NodeStore
from app.store.stats import StoreStats
from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.adapters.slab_format import AdapterLocation

# How long a store outlives its last client, seconds: longer than Serve takes to replace a replica.
GRACE_S = 30.0


@dataclass(frozen=True)
class StoreSpec:
    """What a store is made with; replicas of equal specs on one node share a store."""

    app_name: str
    geometry: AdapterGeometry
    capacity_bytes: int
    extent_bytes: int
    # See `slab.Slab`.
    punch_holes: bool
    # Where packed adapters are kept on this node's disk, and how many bytes of them.
    packed_dir: str
    packed_bytes: int
    grace_s: float = GRACE_S

    @classmethod
    def of(cls, args: SLoRAArgs, app_name: str) -> "StoreSpec":
        return cls(
            app_name,
            adapter_geometry(args),
            args.store_capacity_bytes,
            args.store_extent_bytes,
            punch_holes=args.device == "cpu",
            packed_dir=args.packed_cache_dir or str(default_cache_dir() / "packed"),
            packed_bytes=args.packed_cache_bytes,
        )

    def actor_name(self, node_id: str) -> str:
        # A redeployment with another model or size gets a store of its own beside the old one.
        key = hashlib.sha256(repr(self).encode()).hexdigest()[:12]
        return f"adapter-store:{self.app_name}:{node_id}:{key}"


class AdapterStoreActor:
    """`NodeStore` as a Ray actor; async, so that its calls share one event loop."""

    def __init__(self, spec: StoreSpec) -> None:
        self._spec = spec
        self._store: NodeStore | None = None

    @returns_errors
    async def attach(self, client_pid: int) -> None:
        await self._running().attach(client_pid)

    @returns_errors
    async def lease(self, record: AdapterRecord, holder_pid: int) -> AdapterLocation:
        return await self._running().lease(record, holder_pid)

    @returns_errors
    async def release(self, adapter_id: str, holder_pid: int, token: str) -> bool:
        return self._running().release(adapter_id, holder_pid, token)

    @returns_errors
    async def stats(self) -> StoreStats:
        return self._running().stats()

    @returns_errors
    async def check_integrity(self) -> None:
        self._running().check_integrity()

    async def pid(self) -> int:
        return os.getpid()

    def _running(self) -> NodeStore:
        """The store, started by the first call: Ray runs __init__ outside the event loop."""
        if self._store is None:
            spec = self._spec
            logging.basicConfig(level=logging.INFO)
            # By name, so that a registry that was deployed again is found too.
            registry = ray_private.handle_by_name(REGISTRY_DEPLOYMENT, spec.app_name)
            self._store = NodeStore(
                HostStore(spec.geometry, spec.capacity_bytes, spec.extent_bytes, spec.punch_holes),
                PackedFiles(Path(spec.packed_dir), spec.geometry, spec.packed_bytes),
                RegistryClient(registry),
                spec.grace_s,
                _end_this_actor,
                _unavailable_counter(spec.app_name),
            )
            self._store.start()
        return self._store


def _unavailable_counter(app_name: str) -> Callable[[], None]:
    """Prometheus has it as `ray_slora_unavailable_adapter_requests_total`."""
    counter = Counter(
        "slora_unavailable_adapter_requests",
        "Requests refused since nothing has the bytes of their registered adapter.",
        ("application",),
    )
    counter.set_default_tags({"application": app_name})
    return counter.inc


def _end_this_actor() -> None:
    # exit_actor works in a call only, and this is a timer.
    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
