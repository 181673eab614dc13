"""What one router sees of the replicas, and the order that follows for a request.

Puts together what replicas told Serve, what the board of the process knows and `order`. It knows
nothing of Ray; `serve_router` is its only user beside the simulation in the tests.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from app.routing.load_board import LoadBoard
from app.routing.order import LoadBound, ReplicaLoad, RoutingKeys, order_replicas
from app.routing.spread import AdapterSpread

# Keys of a replica's routing stats.
RANK_KEY = "rank_in_deployment"
HEALTHY_KEY = "healthy"
QUEUE_LEN_KEY = "queue_len"
MODEL_KEY = "base_model"


class SeenReplica(NamedTuple):
    """One replica, as Serve has it."""

    replica_id: str
    routing_stats: Mapping[str, Any]
    max_ongoing_requests: int


class RouterView:
    """Args: what the process knows, what a replica may hold, over how many an adapter goes."""

    def __init__(self, board: LoadBoard, bound: LoadBound, spread: AdapterSpread) -> None:
        self._board = board
        self._bound = bound
        self._spread = spread

    def order(
        self,
        replicas: Sequence[SeenReplica],
        adapter_id: str,
        conversation: str = "",
        avoid: str | None = None,
    ) -> list[int]:
        """Indices of the replicas that a request may go to, the first choice first.

        `adapter_id` is empty for the base model; `avoid` is a replica that must not have it.
        """
        loads = [self._load(replica, avoid) for replica in replicas]
        width = 1
        if adapter_id:
            width = self._spread.width(adapter_id, [load.load for load in loads if load.healthy])
        return order_replicas(RoutingKeys(adapter_id, conversation, width), loads, self._bound)

    def _load(self, replica: SeenReplica, avoid: str | None) -> ReplicaLoad:
        replica_id, stats, max_ongoing_requests = replica
        is_alive = stats.get(HEALTHY_KEY, True) and not self._board.is_dead(replica_id)
        estimate = self._board.estimate(replica_id, stats.get(QUEUE_LEN_KEY, 0))
        return ReplicaLoad(
            # A replica that has not been asked yet is known by its id only.
            rank_in_deployment=str(stats.get(RANK_KEY, replica_id)),
            load=estimate.load,
            healthy=is_alive and replica_id != avoid,
            is_full=estimate.num_requests >= max_ongoing_requests,
            is_saturated=estimate.is_saturated,
        )
