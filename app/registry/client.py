"""Calls of the registry's deployment, from the ingress, the engine replicas and the stores."""

from typing import Any

from app.registry.changes import Position, RegistryChanges
from app.registry.state import AdapterRecord
from app.remote_errors import result_of

# Of this project's names in Ray: the state here, the store actors.
NAMESPACE = "slora"
REGISTRY_DEPLOYMENT = "registry"


class RegistryClient:
    """Calls the registry through its Serve handle; its typed errors are raised here."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def changes_since(self, position: Position | None) -> RegistryChanges:
        changes: RegistryChanges = await self._handle.changes_since.remote(position)
        return changes

    async def wait_for_change(self, position: Position | None, timeout_s: float) -> RegistryChanges:
        changes: RegistryChanges = await self._handle.wait_for_change.remote(position, timeout_s)
        return changes

    async def load(self, name: str, path: str, replace: bool = False) -> AdapterRecord:
        record: AdapterRecord = await result_of(self._handle.load.remote(name, path, replace))
        return record

    async def unload(self, name: str) -> None:
        await result_of(self._handle.unload.remote(name))

    async def report_pool(self, replica_id: str, num_pages: int) -> None:
        await result_of(self._handle.report_pool.remote(replica_id, num_pages))
