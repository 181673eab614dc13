"""The ingress's side of a generation: sends it to a replica, hands back its deltas.

Owns what becomes of an attempt that fails before its first token: with a dead replica the request
is sent once more, to another one, and with an adapter that was replaced on the way once more for
the version that its name means now. It knows nothing of text or HTTP.
"""

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from app import ray_private
from app.generation.text_ends import TextEndedError, TextEnds
from app.registry.state import AdapterRecord
from app.remote_errors import typed_call_error
from slora_core.errors import (
    AdapterNotFoundError,
    AdapterUnavailableError,
    EngineDeadError,
    EngineFaultError,
    InvalidAdapterError,
    InvalidRequestError,
    ServerStoppingError,
)
from slora_core.requests import Delta, Request

logger = logging.getLogger(__name__)

# Replicas that may die while they compute a request, as far as is known: it is refused then, or it
# would kill them all.
MAX_DEATHS_WHILE_RUNNING = 2
# Replicas that may die while the request only waits in them.
MAX_DEATHS_WHILE_WAITING = 4

# What a replica without the adapter says, be it that its name means another version by now.
_ADAPTER_IS_GONE = (AdapterNotFoundError, AdapterUnavailableError, InvalidAdapterError)

# Given an adapter that is gone, and why, what its name means now.
Renew = Callable[[AdapterRecord, Exception], Awaitable[AdapterRecord]]


class EngineClient:
    """Generates on the replicas behind a Serve handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
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
        of the adapter that it names.

        Raises:
            SLoRAError: what the replica reported, or `renew`.
            EngineDeadError: the replica or its engine ended.
            OverloadedError: no replica has room, nor has the queue.
            ServerStoppingError: `stop` was called.
        """
        attempts = _Attempts(request, record, renew)
        while True:
            has_started = has_ended = False
            # The attempt before may still run where the connection broke: its id must not come
            # again.
            attempt_id = f"{request.request_id}.{next(self._attempt_ids)}"
            if self._is_stopped:
                raise _stopping()
            responses = self._send(attempts, attempt_id)
            self._open.add(responses)
            try:
                async for delta in responses:
                    has_ended, has_started = delta.is_last, has_started or bool(delta.token_ids)
                    if delta.error is not None:
                        raise delta.error
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
                typed = typed_call_error(error)
                if typed is not error:
                    has_ended = True
                    logger.warning("request %s lost its replica: %r", request.request_id, error)
                if has_started:
                    raise typed from (None if typed is error else error)
                await attempts.after(typed)
            finally:
                self._open.discard(responses)
                if not has_ended:
                    responses.cancel()

    async def _tell_replicas(self, request_ids: list[str]) -> None:
        answers = self._handle.broadcast("ended_by_text", request_ids)
        await answers.results_async(return_exceptions=True)

    def _send(self, attempts: "_Attempts", attempt_id: str) -> Any:
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


def _stopping() -> ServerStoppingError:
    return ServerStoppingError("the server is being stopped")


class _Attempts:
    """What is left to try of a request that has no token yet."""

    def __init__(self, request: Request, record: AdapterRecord | None, renew: Renew) -> None:
        self.request = request
        self.record = record
        # A replica that just failed it; the router tries it last.
        self.avoid_replica: str | None = None
        self._renew = renew
        # Deaths that it has seen, by whether it was running.
        self._num_deaths = Counter[bool | None]()
        self._is_renewed = False

    async def after(self, error: Exception) -> None:
        """Prepare the next attempt after one that failed so, or raise its error."""
        if isinstance(error, EngineDeadError):
            self._after_death(error)
        elif not isinstance(error, _ADAPTER_IS_GONE):
            raise error
        elif self._is_renewed and not isinstance(error, AdapterUnavailableError):
            raise InvalidRequestError(str(error), "model") from error
        elif self._is_renewed or self.record is None:
            raise error
        else:
            self._is_renewed = True
            self.record = await self._renew(self.record, error)
            self.request = replace(self.request, adapter_id=self.record.adapter_id)

    def _after_death(self, error: EngineDeadError) -> None:
        request_id = self.request.request_id
        deaths = self._num_deaths
        deaths[error.was_running] += 1
        if deaths[True] >= MAX_DEATHS_WHILE_RUNNING:
            logger.error("request %s is refused: engines die of it: %s", request_id, error)
            raise EngineFaultError(
                f"{deaths[True]} engines ended while they computed this request; it is not tried "
                "again"
            ) from error
        may_be_the_reason = deaths[True] + deaths[None] >= MAX_DEATHS_WHILE_RUNNING
        if may_be_the_reason or deaths[False] >= MAX_DEATHS_WHILE_WAITING:
            raise error
        self.avoid_replica = error.replica_id
        logger.warning("request %s is sent again: %s", request_id, error)
