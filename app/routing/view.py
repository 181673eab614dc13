"""What one router sees of the replicas, and the order that follows for a request.

Puts together what replicas told Serve, what the board of the process knows and `order`. It knows
nothing of Ray; `serve_router` is its only user beside the simulation in the tests.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from app.routing.hot_keys import HotKeys
from app.routing.load_board import LoadBoard
from app.routing.order import ReplicaLoad, order_replicas

# Keys of a replica's routing stats, beside those of `hot_keys`.
RANK_KEY = "rank_in_deployment"
HEALTHY_KEY = "healthy"
REQUESTS_KEY = "num_requests"


class SeenReplica(NamedTuple):
    """One replica, as Serve has it."""

    replica_id: str
    routing_stats: Mapping[str, Any]
    max_ongoing_requests: int


class RouterView:
    """Args: as of `order_replicas`, and the tokens of a page."""

    def __init__(
        self, board: LoadBoard, spill_queue_len: int, spill_factor: float, page_tokens: int
    ) -> None:
        self._board = board
        self._spill_queue_len = spill_queue_len
        self._spill_factor = spill_factor
        self._page_tokens = page_tokens
        self.see([])

    def see(self, routing_stats: Sequence[Mapping[str, Any]]) -> None:
        """Take what the replicas told last."""
        self._hot = HotKeys(routing_stats, self._spill_queue_len, self._page_tokens)

    def order(
        self,
        replicas: Sequence[SeenReplica],
        adapter: str,
        prompt_ids: Sequence[int],
        avoid: str | None = None,
    ) -> list[int]:
        """Indices of the replicas that a request may go to, the first choice first.

        `adapter` is empty for the base model; `avoid` is a replica that must not have the request.
        """
        affinity = self._hot.affinity(adapter, prompt_ids)
        loads = [self._load(replica, avoid) for replica in replicas]
        return order_replicas(affinity, loads, self._spill_queue_len, self._spill_factor)

    def _load(self, replica: SeenReplica, avoid: str | None) -> ReplicaLoad:
        replica_id, stats, max_ongoing_requests = replica
        is_alive = stats.get(HEALTHY_KEY, True) and not self._board.is_dead(replica_id)
        estimate = self._board.estimate(replica_id, stats.get(REQUESTS_KEY, 0))
        return ReplicaLoad(
            # A replica that has not been asked yet is known by its id only.
            rank_in_deployment=str(stats.get(RANK_KEY, replica_id)),
            load=estimate.load,
            is_usable=is_alive and replica_id != avoid,
            is_full=estimate.num_requests >= max_ongoing_requests,
            is_saturated=estimate.is_saturated,
        )
