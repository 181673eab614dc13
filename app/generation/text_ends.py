"""Tells the replicas which requests ended by their text, not because somebody left.

A stop string is found in the ingress, which then closes the request's stream as it does for a
client that left. Only the replicas' counts need to know the difference, so ids are gathered and
sent to all replicas at once.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from app.tracing.spans import NoFailure

logger = logging.getLogger(__name__)

# Seconds for which ids gather: a call of every replica costs each of them a millisecond.
GATHER_S = 1.0


class TextEndedError(NoFailure):
    """Thrown into the deltas of a request whose text has ended; nobody is told of it."""


class TextEnds:
    """`tell` is given the ids that gathered; what it fails with is logged and they are lost."""

    def __init__(self, tell: Callable[[list[str]], Awaitable[object]]) -> None:
        self._tell = tell
        self._request_ids: list[str] = []
        self._telling: asyncio.Task[None] | None = None

    def add(self, request_id: str) -> None:
        self._request_ids.append(request_id)
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell_all())

    async def _tell_all(self) -> None:
        while self._request_ids:
            await asyncio.sleep(GATHER_S)
            request_ids, self._request_ids = self._request_ids, []
            try:
                await self._tell(request_ids)
            except Exception as error:
                logger.info("replicas count %d ended texts as aborts: %r", len(request_ids), error)
