"""Serve's request router: an adapter's requests stay on the replica that has it loaded.

Owns the translation between Serve's routing interface and `routing.order`. Serve pickles this
module by value into every process that holds a handle, so it imports nothing heavy.
"""

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from app import ray_private
from app.routing.order import LoadBound, ReplicaLoad, RoutingKeys, order_replicas
from app.routing.spread import AdapterSpread

# Keys of a replica's routing stats.
RANK_KEY = "rank_in_deployment"
HEALTHY_KEY = "healthy"
QUEUE_LEN_KEY = "queue_len"
MODEL_KEY = "base_model"


class AffinityRouter(RequestRouter):
    """Routes by a request's adapter and its conversation: what `EngineServer.generate` is given."""

    def initialize_state(self, spill_queue_len: int = 8, spill_factor: float = 1.25) -> None:
        self._bound = LoadBound(spill_queue_len, spill_factor)
        self._spread = AdapterSpread(spill_queue_len)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Each replica in a list of its own: Serve reorders within a list by queue length.

        None where no replica has a living engine; Serve asks again, after longer and longer pauses.
        """
        adapter_id, conversation, avoid = "", "", None
        if pending_request is not None:
            candidate_replicas = _of_same_model(candidate_replicas, pending_request)
            adapter_id = pending_request.metadata.session_id
            conversation = _of_request(pending_request, "conversation")
            avoid = _replica_to_avoid(pending_request)
            ray_private.pause_when_all_are_full(pending_request)
        loads = [self._load(replica, avoid) for replica in candidate_replicas]
        width = 1
        if adapter_id:
            queue_lens = [load.queue_len for load in loads if load.healthy]
            width = self._spread.width(adapter_id, queue_lens)
        keys = RoutingKeys(adapter_id, conversation, width)
        order = order_replicas(keys, loads, self._bound)
        return [[candidate_replicas[index]] for index in order]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        metadata = pending_request.metadata
        self._spread.started(metadata.internal_request_id, metadata.session_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._spread.ended(internal_request_id)

    def _load(self, replica: RunningReplica, avoid: str | None) -> ReplicaLoad:
        stats = replica.routing_stats
        replica_id = replica.replica_id.unique_id
        queue_len = ray_private.known_queue_len(self, replica)
        if queue_len is None:
            # Others may have sent it something.
            queue_len = stats.get(QUEUE_LEN_KEY, 0)
        return ReplicaLoad(
            # A replica that has not been asked yet is known by its id only.
            rank_in_deployment=str(stats.get(RANK_KEY, replica_id)),
            queue_len=queue_len,
            healthy=stats.get(HEALTHY_KEY, True) and replica_id != avoid,
        )


def _of_same_model(
    replicas: list[RunningReplica], pending_request: PendingRequest
) -> list[RunningReplica]:
    """Those of the base model that a request is for, or all, which then refuse it."""
    model = _of_request(pending_request, "model_key")
    same = [replica for replica in replicas if replica.routing_stats.get(MODEL_KEY, model) == model]
    return same or replicas


def _of_request(pending_request: PendingRequest, field: str) -> str:
    """Of the request that is `generate`'s first argument; calls of other methods have none."""
    [*arguments] = pending_request.args
    return getattr(arguments[0], field, "") if arguments else ""


def _replica_to_avoid(pending_request: PendingRequest) -> str | None:
    """The replica that just failed this request: what `EngineServer.generate` is called with."""
    arguments: dict[str, Any] = pending_request.kwargs
    return arguments.get("avoid_replica")
