"""What became of one request on its way through the replicas, for those who log and trace it.

Owns a span for each attempt, and no decision: `client` tells it of attempts and tokens,
`text_stream` of the end.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from app.registry.state import AdapterRecord
from app.tracing.spans import NO_SPAN, NO_TRACING, Carrier, Tracing, ending
from slora_core.requests import FinishReason, Request


class Course:
    """Of one request, from the moment that it is made; it has spans where it has a `trace`."""

    def __init__(self, tracing: Tracing = NO_TRACING) -> None:
        self._tracing = tracing
        self._span = NO_SPAN
        self._has_tokens = False
        # As the last attempt had it: another version than was asked for, where that was replaced.
        self.record: AdapterRecord | None = None
        # How often it went on in another engine.
        self.num_moves = 0
        # Of `time.monotonic`; None where there was no token.
        self.first_token_at: float | None = None
        self.finish_reason: FinishReason | None = None

    @contextmanager
    def attempt(
        self, attempt_id: str, request: Request, record: AdapterRecord | None
    ) -> Iterator[Carrier | None]:
        """While a replica has it; what the replica's spans belong under."""
        self.record = record
        self.num_moves = request.num_moves
        self._has_tokens = False
        if request.trace is None:
            yield None
            return
        span = self._span = self._tracing.start("attempt", request.trace, "client")
        span.set("slora.attempt_id", attempt_id)
        span.set("slora.moves", request.num_moves)
        span.set("slora.tokens_before", len(request.output_ids))
        with ending(span):
            yield span.carrier

    def tokens_came(self) -> None:
        """To be called with each delta that has tokens."""
        if not self._has_tokens:
            self._has_tokens = True
            self._span.event("first token")
            if self.first_token_at is None:
                self.first_token_at = time.monotonic()
