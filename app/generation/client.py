"""The ingress's side of a generation: sends it to a replica, hands back its tokens.

Owns what becomes of a replica that fails: a request that has no token yet is sent once more, to
another replica. It knows nothing of text or HTTP.
"""

import itertools
import logging
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import grpc
from ray.exceptions import RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from app import ray_private
from app.generation.replica_protocol import GenerateRequest, TokenChunk
from slora_core.errors import EngineDeadError, OverloadedError

logger = logging.getLogger(__name__)

# How the end of a replica shows at a handle. Of gRPC's statuses, Serve itself makes UNAVAILABLE a
# RayActorError in most places; CANCELLED is what a stopping replica's server ends a call with. Any
# other, such as a message over the size limit, would meet the next replica just so.
REPLICA_ERRORS = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
REPLICA_STATUSES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
NUM_ATTEMPTS = 2


class EngineClient:
    """Generates on the replicas behind a Serve handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._attempt_ids = itertools.count()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of one request, the last with a finish reason; closing it aborts the request.

        Raises:
            SLoRAError: what the replica reported.
            EngineDeadError: the replica or its engine ended.
            OverloadedError: no replica has room, nor has the queue.
        """
        for attempt in range(1, NUM_ATTEMPTS + 1):
            has_started = False
            failed_replica = None
            chunks = self._stream(request)
            try:
                async for chunk in chunks:
                    if chunk.error is not None:
                        failed_replica = chunk.replica_id
                        raise chunk.error
                    has_started = True
                    yield chunk
                return
            except EngineDeadError as error:
                if has_started or attempt == NUM_ATTEMPTS:
                    raise
                logger.warning("request %s is sent again: %s", request.request_id, error)
                request = replace(request, avoid_replica=failed_replica)
            finally:
                await chunks.aclose()

    async def _stream(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """One attempt; what Ray raises becomes a typed error."""
        # The attempt before may still run where the connection broke: its id must not come again.
        request_id = f"{request.request_id}.{next(self._attempt_ids)}"
        adapter_id = request.record.adapter_id if request.record is not None else ""
        responses = ray_private.stream_by_value(
            self._handle, "generate", adapter_id, replace(request, request_id=request_id)
        )
        has_ended = False
        try:
            async for chunk in responses:
                has_ended = chunk.finish_reason is not None or chunk.error is not None
                yield chunk
            if not has_ended:
                raise EngineDeadError("the engine replica stopped before the request ended")
        except (*REPLICA_ERRORS, grpc.aio.AioRpcError) as error:
            has_ended = True
            if isinstance(error, grpc.aio.AioRpcError) and error.code() not in REPLICA_STATUSES:
                raise
            logger.warning("request %s lost its replica: %s", request.request_id, error)
            raise EngineDeadError("the engine replica ended before the request did") from error
        except BackPressureError as error:
            has_ended = True
            raise OverloadedError("the server is overloaded; try again later") from error
        finally:
            if not has_ended:
                responses.cancel()
