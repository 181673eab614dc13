"""The ingress's side of a generation: sends it to a replica, hands back its deltas.

Owns the streams that run and their end at a stop; what is tried where an attempt fails is for
`attempts` to say. It knows nothing of text or HTTP.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

from app import ray_private
from app.generation.attempts import Attempts, Renew
from app.generation.text_ends import TextEndedError, TextEnds
from app.registry.state import AdapterRecord
from app.remote_errors import typed_call_error
from slora_core.errors import EngineDeadError, ServerStoppingError
from slora_core.requests import Delta, Request

logger = logging.getLogger(__name__)

# Told of a request that waits for an engine again, every so many seconds: less than proxies wait
# for a sign of life.
WAITING = Delta("", [])
WAITING_EVERY_S = 5.0


class EngineClient:
    """Generates on the replicas behind a Serve handle.

    Args:
        failover_timeout_s: how long a request that lost its engine waits for another one.
    """

    def __init__(self, handle: Any, failover_timeout_s: float) -> None:
        self._handle = handle
        self._failover_timeout_s = failover_timeout_s
        self._attempt_ids = itertools.count()
        self._text_ends = TextEnds(self._tell_replicas)
        self._open: set[Any] = set()
        self._is_stopped = False

    def stop(self) -> None:
        """End everything that runs with a ServerStoppingError, and what comes until `go_on`."""
        self._is_stopped = True
        for responses in self._open:
            responses.cancel()

    def go_on(self) -> None:
        self._is_stopped = False

    async def generate(
        self, request: Request, record: AdapterRecord | None, renew: Renew
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of one request, the last with a finish reason; closing it aborts the request.

        So does a TextEndedError thrown into it, which is no abort to those who count. `record` is
        of the adapter that it names. A replica that ends on the way costs a pause, in which there
        are deltas without tokens every few seconds.

        Raises:
            SLoRAError: what the replica reported, or `renew`.
            EngineDeadError: the engine ended, and none took the request over in time.
            EngineFaultError: engines end over this request.
            OverloadedError: no replica has room, nor has the queue.
            ServerStoppingError: `stop` was called.
        """
        attempts = Attempts(request, record, renew, self._failover_timeout_s)
        while True:
            has_ended = False
            failure: Exception
            # The attempt before may still run where the connection broke: its id must not come
            # again.
            attempt_id = f"{request.request_id}.{next(self._attempt_ids)}"
            if self._is_stopped:
                raise _stopping()
            responses = self._send(attempts, attempt_id)
            self._open.add(responses)
            try:
                timeout_s = attempts.arrival_timeout_s
                deltas = responses if timeout_s is None else _going_on(responses, timeout_s)
                async for delta in deltas:
                    has_ended = delta.is_last
                    if delta.error is not None:
                        raise delta.error
                    if delta is not WAITING:
                        attempts.received(delta)
                    yield delta
                if not has_ended:
                    raise EngineDeadError("the engine replica stopped before the request ended")
                return
            except TextEndedError:
                self._text_ends.add(attempt_id)
                return
            except asyncio.CancelledError:
                # Also how Serve tells that a call was cancelled.
                if self._is_stopped:
                    raise _stopping() from None
                raise
            except Exception as error:
                if self._is_stopped:
                    raise _stopping() from error
                failure = typed_call_error(error)
                # Then there is nothing left to cancel.
                has_ended = has_ended or failure is not error
                if has_ended and isinstance(failure, EngineDeadError):
                    logger.warning("request %s lost its replica: %r", request.request_id, error)
            finally:
                self._open.discard(responses)
                if not has_ended:
                    responses.cancel()
            await attempts.after(failure)

    async def _tell_replicas(self, request_ids: list[str]) -> None:
        answers = self._handle.broadcast("ended_by_text", request_ids)
        await answers.results_async(return_exceptions=True)

    def _send(self, attempts: Attempts, attempt_id: str) -> Any:
        """Start the next attempt; Serve's response, an async iterator of deltas."""
        request = attempts.request
        return ray_private.stream_by_value(
            self._handle,
            "generate",
            request.adapter_id or "",
            replace(request, request_id=attempt_id),
            attempts.record,
            avoid_replica=attempts.avoid_replica,
        )


async def _going_on(responses: Any, timeout_s: float) -> AsyncIterator[Delta]:
    """The deltas of a request that was sent again, the first of which must come in time.

    WAITING every few seconds until there are tokens: its client has waited before.
    """
    loop = asyncio.get_running_loop()
    arrives_by, has_arrived = loop.time() + timeout_s, False
    # Not awaited with a timeout, which would end it.
    coming = asyncio.ensure_future(anext(responses, None))
    try:
        while True:
            left_s = WAITING_EVERY_S if has_arrived else arrives_by - loop.time()
            await asyncio.wait({coming}, timeout=min(max(0.0, left_s), WAITING_EVERY_S))
            if coming.done():
                delta = coming.result()
                if delta is None:
                    return
                has_arrived = True
                yield delta
                if delta.token_ids:
                    break
                coming = asyncio.ensure_future(anext(responses, None))
            elif left_s <= 0:
                raise EngineDeadError(
                    "the request lost its engine, and no other one took it over in time"
                )
            else:
                yield WAITING
    finally:
        coming.cancel()
    async for delta in responses:
        yield delta


def _stopping() -> ServerStoppingError:
    return ServerStoppingError("the server is being stopped")
