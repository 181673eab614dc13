"""What became of one request on its way through the replicas, for those who log it.

Owns no decision: `client` tells it of attempts and tokens, `text_stream` of the end.
"""

import time

from app.registry.state import AdapterRecord
from slora_core.requests import FinishReason, Request


class Course:
    """Of one request, from the moment that it is made."""

    def __init__(self) -> None:
        # As the last attempt had it: another version than was asked for, where that was replaced.
        self.record: AdapterRecord | None = None
        # How often it went on in another engine.
        self.num_moves = 0
        # Of `time.monotonic`; None where there was no token.
        self.first_token_at: float | None = None
        self.finish_reason: FinishReason | None = None

    def attempt(self, request: Request, record: AdapterRecord | None) -> None:
        """It is sent to a replica."""
        self.record = record
        self.num_moves = request.num_moves

    def tokens_came(self) -> None:
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
