"""When a request's answer is worth nothing any more, by its header or its body.

Owns the header and how the two go together. What is done at that time is `generation.client`'s.
"""

import math

from starlette.requests import Request

from app.http.schemas import SamplingFields
from slora_core.errors import InvalidRequestError

# Seconds, as a decimal number; the body's field is `timeout`.
TIMEOUT_HEADER = "X-Request-Timeout"


def deadline_of(request: Request, body: SamplingFields, arrived_at: float) -> float | None:
    """Seconds since the epoch, of a request that came at `arrived_at`; None: there is none.

    Raises:
        InvalidRequestError: a header that is no positive number.
    """
    timeouts = [body.timeout, _from_header(request.headers.get(TIMEOUT_HEADER))]
    given = [timeout_s for timeout_s in timeouts if timeout_s is not None]
    return arrived_at + min(given) if given else None


def _from_header(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        timeout_s = float(value)
    except ValueError:
        timeout_s = math.nan
    if not 0.0 < timeout_s < math.inf:
        raise InvalidRequestError(
            f"the header {TIMEOUT_HEADER} is {value[:100]!r}; it must be a positive number of "
            "seconds",
            TIMEOUT_HEADER,
        )
    return timeout_s
