"""The ingress's side of a generation: sends it to a replica, hands back its deltas.

Owns the streams that run and their end at a stop; what is tried where an attempt fails is for
`attempts` to say. It knows nothing of text or HTTP.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

from app import ray_private
from app.generation.attempts import Attempts, Renew
from app.generation.backlog import Backlog
from app.generation.course import Course
from app.generation.text_ends import TextEndedError, TextEnds
from app.registry.state import AdapterRecord
from app.remote_errors import typed_call_error
from app.routing.load_board import board
from app.tracing.spans import Carrier
from slora_core.errors import (
    EngineDeadError,
    RequestTimeoutError,
    ServerStoppingError,
    SLoRAError,
)
from slora_core.requests import Delta, Request

logger = logging.getLogger(__name__)

# Told of a request that waits for an engine again, every so many seconds: less than proxies wait
# for a sign of life.
WAITING = Delta("", [])
WAITING_EVERY_S = 5.0


class EngineClient:
    """Generates on the replicas behind a Serve handle.

    Args:
        backlog: bounds what waits for its first token.
        failover_timeout_s: how long a request that lost its engine waits for another one.
        model_key: of the base model that requests are for; "" is any.
    """

    def __init__(
        self, handle: Any, backlog: Backlog, failover_timeout_s: float, model_key: str = ""
    ) -> None:
        self._handle = handle
        self._model_key = model_key
        self._backlog = backlog
        self._failover_timeout_s = failover_timeout_s
        self._attempt_ids = itertools.count()
        self._text_ends = TextEnds(self._tell_replicas)
        self._open: set[_Ending] = set()
        self._is_stopped = False
        # Of what routers know; they are in this process.
        self._board = board()

    def stop(self) -> None:
        """End everything that runs with a ServerStoppingError, and what comes until `go_on`."""
        self._is_stopped = True
        for ending in self._open:
            ending.end(_stopping())

    def go_on(self) -> None:
        self._is_stopped = False

    async def generate(
        self,
        request: Request,
        record: AdapterRecord | None,
        renew: Renew,
        course: Course | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of one request, the last with a finish reason; closing it aborts the request.

        So does a TextEndedError thrown into it, which is no abort to those who count. `record` is
        of the adapter that it names. A replica that ends on the way costs a pause, in which there
        are deltas without tokens every few seconds. `course` is told of what happens.

        Raises:
            SLoRAError: what the replica reported, or `renew`.
            EngineDeadError: the engine ended, and none took the request over in time.
            EngineFaultError: engines end over this request.
            OverloadedError: as much waits as may.
            RequestTimeoutError: its deadline has passed.
            ServerStoppingError: `stop` was called.
        """
        course = course or Course()
        attempts = Attempts(request, record, renew, self._failover_timeout_s)
        with (
            self._ending(request) as ending,
            self._backlog.waiting(len(request.prompt_ids)) as waiting,
        ):
            while True:
                ending.check()
                # The attempt before may still run where the connection broke: its id must not come
                # again.
                attempt_id = f"{request.request_id}.{next(self._attempt_ids)}"
                try:
                    with course.attempt(attempt_id, attempts.request, attempts.record) as trace:
                        responses = self._send(attempts, attempt_id, trace)
                        deltas = self._attempt(attempts, attempt_id, responses, ending)
                        async with aclosing(deltas):
                            async for delta in deltas:
                                if delta.token_ids:
                                    waiting.begin()
                                    course.tokens_came()
                                yield delta
                    return
                except TextEndedError:
                    self._text_ends.add(attempt_id)
                    return
                except SLoRAError as error:
                    await attempts.after(error)

    async def _attempt(
        self, attempts: Attempts, attempt_id: str, responses: Any, ending: "_Ending"
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of one attempt; raises a SLoRAError where it failed, what it was ended by too."""
        timeout_s = attempts.arrival_timeout_s
        has_ended = False
        ending.responses = responses
        try:
            async for delta in responses if timeout_s is None else _going_on(responses, timeout_s):
                has_ended = delta.is_last
                if delta.load is not None:
                    self._board.heard(delta.load)
                if delta.error is not None:
                    self._hear_of_death(delta.error)
                    raise delta.error
                if delta is not WAITING:
                    attempts.received(delta)
                yield delta
            if not has_ended:
                raise EngineDeadError("the engine replica stopped before the request ended")
        except asyncio.CancelledError:
            # Also how Serve tells that a call was cancelled.
            ending.check()
            raise
        except Exception as error:
            ending.check()
            typed = typed_call_error(error)
            if typed is error:
                raise
            # There is nothing left to cancel.
            has_ended = True
            logger.warning("attempt %s failed: %r", attempt_id, error)
            raise typed from error
        finally:
            ending.responses = None
            if not has_ended:
                responses.cancel()

    def _hear_of_death(self, error: SLoRAError) -> None:
        """Have routers leave a replica alone before Serve knows what this process does."""
        if isinstance(error, EngineDeadError) and error.replica_id is not None:
            self._board.died(error.replica_id)

    @contextmanager
    def _ending(self, request: Request) -> Iterator["_Ending"]:
        """What ends a request from outside, for as long as it runs."""
        ending = _Ending()
        timer = None
        if request.deadline is not None:
            left_s = max(0.0, request.deadline - time.time())
            error = RequestTimeoutError("the request's timeout has passed")
            timer = asyncio.get_running_loop().call_later(left_s, ending.end, error)
        if self._is_stopped:
            ending.end(_stopping())
        self._open.add(ending)
        try:
            yield ending
        finally:
            self._open.discard(ending)
            if timer is not None:
                timer.cancel()

    async def _tell_replicas(self, request_ids: list[str]) -> None:
        answers = self._handle.broadcast("ended_by_text", request_ids)
        await answers.results_async(return_exceptions=True)

    def _send(self, attempts: Attempts, attempt_id: str, trace: Carrier | None) -> Any:
        """Start the next attempt; Serve's response, an async iterator of deltas."""
        request = attempts.request
        return ray_private.stream_by_value(
            self._handle,
            "generate",
            request.adapter_id or "",
            replace(request, request_id=attempt_id, trace=trace, model_key=self._model_key),
            attempts.record,
            avoid_replica=attempts.avoid_replica,
        )


class _Ending:
    """Ends a request with an error of others, wherever it is."""

    def __init__(self) -> None:
        # Of the attempt that runs.
        self.responses: Any = None
        self._error: SLoRAError | None = None

    def end(self, error: SLoRAError) -> None:
        self._error = error
        if self.responses is not None:
            self.responses.cancel()

    def check(self) -> None:
        """Raise the error that the request was ended with, if it was."""
        if self._error is not None:
            raise self._error


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
