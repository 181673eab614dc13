"""Serve's request router: a request goes where its adapter and its conversation are.

Owns the translation between Serve's routing interface and `routing.view`. Serve pickles this
module by value into every process that holds a handle, so it imports nothing heavy; what a process
has one of is imported where it is used, or each router would have a copy.
"""

from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from app import ray_private
from app.routing.order import LoadBound
from app.routing.spread import AdapterSpread
from app.routing.view import MODEL_KEY, RouterView, SeenReplica
from app.routing.waiting_line import WaitingLine

# Seconds after which a request that waits for room looks for it unasked: other processes' requests
# end, too.
LOOK_AGAIN_S = 0.25


class AffinityRouter(ray_private.PatientRouter):
    """Routes by a request's adapter and its conversation: what `EngineServer.generate` is given."""

    def initialize_state(self, spill_queue_len: int = 8, spill_factor: float = 1.25) -> None:
        from app.routing.load_board import board

        # What `generation.client` of this process hears.
        self._board = board()
        self._spread = AdapterSpread(spill_queue_len)
        bound = LoadBound(spill_queue_len, spill_factor)
        self._view = RouterView(self._board, bound, self._spread)
        self._line = WaitingLine()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Each replica in a list of its own: Serve reorders within a list by queue length.

        Returns when there is one that may have the request, as far as is known; until then the
        request waits in line. A request that is cancelled ends the call.
        """
        if pending_request is None:
            return self._ordered(candidate_replicas)
        # Where a replica is full after all.
        ray_private.pause_when_all_are_full(pending_request)
        # One that has lost its engine has waited for longer than since it was sent again.
        since = getattr(_request(pending_request), "arrived_at", None) or pending_request.created_at
        ordered = self._ordered(candidate_replicas, pending_request)
        while not ordered:
            await self._line.wait(since, LOOK_AGAIN_S)
            ordered = self._ordered(list(self.curr_replicas.values()), pending_request)
            if not ordered and _replica_to_avoid(pending_request) is not None:
                # What is no room for this one may be some for the next.
                self._line.wake(since)
        return ordered

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called with every change of the replicas or of their stats."""
        super().update_replicas(replicas)
        self._line.wake()

    def on_sending(self, replica_id: ReplicaID) -> None:
        self._board.sent(replica_id.unique_id)
        # There may be room for one more.
        self._line.wake()

    def on_counted(self, replica_id: ReplicaID, num_requests: int) -> None:
        self._board.counted(replica_id.unique_id, num_requests)

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        metadata = pending_request.metadata
        self._spread.started(metadata.internal_request_id, metadata.session_id)
        prompt_ids = getattr(_request(pending_request), "prompt_ids", ())
        self._board.sent_prompt(replica_id.unique_id, len(prompt_ids))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._spread.ended(internal_request_id)
        self._board.ended(replica_id.unique_id)
        self._line.wake()

    def _ordered(
        self, candidates: Sequence[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            candidates = _of_same_model(candidates, pending_request)
        seen = [
            SeenReplica(
                replica.replica_id.unique_id, replica.routing_stats, replica.max_ongoing_requests
            )
            for replica in candidates
        ]
        if pending_request is None:
            order = self._view.order(seen, "")
        else:
            order = self._view.order(
                seen,
                pending_request.metadata.session_id,
                getattr(_request(pending_request), "conversation", ""),
                _replica_to_avoid(pending_request),
            )
        return [[candidates[index]] for index in order]


def _of_same_model(
    replicas: Sequence[RunningReplica], pending_request: PendingRequest
) -> Sequence[RunningReplica]:
    """Those of the base model that a request is for, or all, which then refuse it."""
    model = getattr(_request(pending_request), "model_key", "")
    same = [replica for replica in replicas if replica.routing_stats.get(MODEL_KEY, model) == model]
    return same or replicas


def _replica_to_avoid(pending_request: PendingRequest) -> str | None:
    """The replica that failed the request: what `EngineServer.generate` is called with."""
    arguments: dict[str, Any] = pending_request.kwargs
    return arguments.get("avoid_replica")


def _request(pending_request: PendingRequest) -> object:
    """The request, where the call is of `EngineServer.generate`."""
    return pending_request.args[0] if pending_request.args else None
