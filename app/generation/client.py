"""The ingress's side of a generation: sends it to a replica, hands back its deltas.

Owns what becomes of an attempt that fails before its first token: with a dead replica the request
is sent once more, to another one, and with an adapter that was replaced on the way once more for
the version that its name means now. It knows nothing of text or HTTP.
"""

import contextvars
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc
from ray.exceptions import RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from slora_core.errors import (
    AdapterNotFoundError,
    EngineDeadError,
    InvalidAdapterError,
    InvalidRequestError,
    OverloadedError,
)
from slora_core.requests import Delta, FinishReason, Request

logger = logging.getLogger(__name__)

# How the end of a replica shows at a handle. Of gRPC's statuses, Serve itself makes UNAVAILABLE a
# RayActorError in most places; CANCELLED is what a stopping replica's server ends a call with. Any
# other, such as a message over the size limit, would meet the next replica just so.
REPLICA_ERRORS = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
REPLICA_STATUSES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
NUM_ATTEMPTS = 2

# Given the request whose adapter is gone and why, the same request for the adapter's new version.
Renew = Callable[[Request, Exception], Awaitable[Request]]


class EngineClient:
    """Generates on the replicas behind a Serve handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._attempt_ids = itertools.count()

    async def generate(self, request: Request, renew: Renew) -> AsyncGenerator[Delta, None]:
        """Deltas of one request, the last with a finish reason; closing it aborts the request.

        Raises:
            SLoRAError: what the replica reported, or `renew`.
            EngineDeadError: the replica or its engine ended.
            OverloadedError: no replica has room, nor has the queue.
        """
        num_attempts, is_renewed = 1, False
        avoid_replica: str | None = None
        while True:
            has_started = has_ended = False
            responses = self._send(request, avoid_replica)
            try:
                async for delta in responses:
                    has_ended, has_started = delta.is_last, has_started or bool(delta.token_ids)
                    if delta.error is None:
                        yield _checked(delta)
                        continue
                    if delta.token_ids:
                        yield delta._replace(error=None)
                    raise delta.error
                if not has_ended:
                    raise EngineDeadError("the engine replica stopped before the request ended")
                return
            except (AdapterNotFoundError, InvalidAdapterError) as error:
                if has_started or request.adapter_id is None:
                    raise
                if is_renewed:
                    raise InvalidRequestError(str(error), "model") from error
                request, is_renewed = await renew(request, error), True
            except Exception as error:
                typed = _typed(error)
                has_ended = has_ended or typed is not error
                if not isinstance(typed, EngineDeadError) or has_started:
                    raise typed from (None if typed is error else error)
                if num_attempts == NUM_ATTEMPTS:
                    raise typed from error
                num_attempts += 1
                avoid_replica = typed.replica_id
                logger.warning("request %s is sent again: %s", request.request_id, error)
            finally:
                if not has_ended:
                    responses.cancel()

    def _send(self, request: Request, avoid_replica: str | None) -> Any:
        """Start one attempt; Serve's response, an async iterator of deltas."""
        # The attempt before may still run where the connection broke: its id must not come again.
        attempt_id = f"{request.request_id}.{next(self._attempt_ids)}"
        # By value, over gRPC: several times cheaper a delta than Ray's object references.
        handle = self._handle.options(
            stream=True, session_id=request.adapter_id or "", _by_reference=False
        )
        # In a context of its own: Serve's router takes calls from within one HTTP request for one
        # and the same, and would let all but one of several prompts wait for ever.
        return contextvars.Context().run(
            handle.generate.remote, replace(request, request_id=attempt_id), avoid_replica
        )


def _checked(delta: Delta) -> Delta:
    if delta.finish_reason is FinishReason.ABORT:
        raise EngineDeadError("the engine gave the request up")
    return delta


def _typed(error: Exception) -> Exception:
    """What an attempt failed with as one of our errors, where it is known; else as it is."""
    if isinstance(error, BackPressureError):
        return OverloadedError("the server is overloaded; try again later")
    is_status = isinstance(error, grpc.aio.AioRpcError) and error.code() in REPLICA_STATUSES
    if is_status or isinstance(error, REPLICA_ERRORS):
        return EngineDeadError("the engine replica ended before the request did")
    return error
