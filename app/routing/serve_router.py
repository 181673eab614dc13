"""Serve's request router: an adapter's requests stay on the replica that has it loaded.

Owns the translation between Serve's routing interface and `routing.order`. Serve pickles this
module by value into every process that holds a handle, so it imports nothing heavy.
"""

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from app import ray_private
from app.routing.order import ReplicaLoad, order_replicas

# Keys of a replica's routing stats.
RANK_KEY = "rank_in_deployment"
HEALTHY_KEY = "healthy"


class AffinityRouter(RequestRouter):
    """Routes by the handle's `session_id`, the adapter's id; empty for the base model."""

    def initialize_state(self, spill_queue_len: int = 8, spill_factor: float = 1.25) -> None:
        self._spill_queue_len = spill_queue_len
        self._spill_factor = spill_factor

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Each replica in a list of its own: Serve reorders within a list by queue length."""
        key, avoid = "", None
        if pending_request is not None:
            key = pending_request.metadata.session_id
            avoid = _replica_to_avoid(pending_request)
            ray_private.pause_when_all_are_full(pending_request)
        loads = [self._load(replica, avoid) for replica in candidate_replicas]
        order = order_replicas(key, loads, self._spill_queue_len, self._spill_factor)
        return [[candidate_replicas[index]] for index in order]

    def _load(self, replica: RunningReplica, avoid: str | None) -> ReplicaLoad:
        stats = replica.routing_stats
        replica_id = replica.replica_id.unique_id
        return ReplicaLoad(
            # A replica that has not been asked yet is known by its id only.
            rank_in_deployment=str(stats.get(RANK_KEY, replica_id)),
            queue_len=ray_private.known_queue_len(self, replica),
            healthy=stats.get(HEALTHY_KEY, True) and replica_id != avoid,
        )


def _replica_to_avoid(pending_request: PendingRequest) -> str | None:
    """The replica that just failed this request: what `EngineServer.generate` is called with."""
    arguments: dict[str, Any] = pending_request.kwargs
    return arguments.get("avoid_replica")
