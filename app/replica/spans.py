"""Spans of what a replica does for a request: the adapter's lease, the engine's queue and run.

The engine process knows no traces: it says when it began and ended a request, and what was between
is told afterwards. A request that is not traced costs a look at one field.
"""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)

from app.tracing.spans import Tracing, ending, failure_of
from slora_core.engine.streams import DeltaStream
from slora_core.requests import Request


class ReplicaSpans:
    """Args:
    replica_id: that spans are of.
    """

    def __init__(self, tracing: Tracing, replica_id: str) -> None:
        self._tracing = tracing
        self._replica_id = replica_id

    def leasing(
        self, request: Request, holding: AbstractAsyncContextManager[None]
    ) -> AbstractAsyncContextManager[None]:
        """`holding` the request's adapter, with a span until it is held."""
        return holding if request.trace is None else self._leasing(request, holding)

    def running(self, request: Request, stream: DeltaStream) -> AbstractContextManager[None]:
        """While `stream` is read, which was just begun; its spans come at the end."""
        return nullcontext() if request.trace is None else self._running(request, stream)

    @asynccontextmanager
    async def _leasing(
        self, request: Request, holding: AbstractAsyncContextManager[None]
    ) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            with ending(self._tracing.start("lease adapter", request.trace)) as span:
                span.set("slora.replica_id", self._replica_id)
                span.set("slora.adapter_id", request.adapter_id)
                await stack.enter_async_context(holding)
            yield

    @contextmanager
    def _running(self, request: Request, stream: DeltaStream) -> Iterator[None]:
        queued_at = time.time()
        failure: str | None = None
        try:
            yield
        except BaseException as error:
            failure = failure_of(error)
            raise
        finally:
            self._tell(request, stream, queued_at, failure)

    def _tell(
        self, request: Request, stream: DeltaStream, queued_at: float, failure: str | None
    ) -> None:
        ended_at = stream.ended_at or time.time()
        queue = self._tracing.start("engine queue", request.trace, at=queued_at)
        queue.set("slora.replica_id", self._replica_id)
        if stream.begun_at is None:
            queue.end(failure, ended_at)
            return
        queue.end(at=stream.begun_at)
        run = self._tracing.start("engine run", request.trace, at=stream.begun_at)
        run.set("slora.replica_id", self._replica_id)
        if stream.first_token_at is not None:
            run.event("first token", stream.first_token_at)
        run.end(failure, ended_at)
