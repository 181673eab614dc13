"""What `routes` tells `service` of a request beside its body."""

from dataclasses import dataclass, field

from app.http.request_ids import drawn_id
from app.tracing.spans import Carrier


@dataclass(frozen=True)
class Envelope:
    """What is known of a request beside its body."""

    # Its client's, which others may use too.
    request_id: str = field(default_factory=drawn_id)
    # When its answer is worth nothing any more, seconds since the epoch.
    deadline: float | None = None
    # Of its span; None where it is not traced.
    trace: Carrier | None = None
