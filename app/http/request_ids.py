"""The id under which clients, their proxies and the logs speak of one HTTP request.

Owns what may be one. A client sends it as `X-Request-Id`, or Serve has drawn one; in either case
Serve itself writes it into every answer's header, of its own errors too. So nothing here does: a
header that is there twice is read as both values.
"""

import re
import uuid

from starlette.datastructures import Headers

from slora_core.errors import InvalidRequestError

HEADER = "X-Request-Id"
# It is in each token's message of an engine; a UUID has 36, a W3C trace context 55.
MAX_LEN = 128

# Printable ASCII: it is written into lines of logs, where spaces part what is said.
_VALID = re.compile(rf"[!-~]{{1,{MAX_LEN}}}")


def drawn_id() -> str:
    return uuid.uuid4().hex


def request_id_of(headers: Headers) -> str:
    """A request's own id, or a drawn one where nobody has given it any.

    Another one instead of an id that cannot be used would be in the logs alone: the answer's header
    has what came. So such a request is refused.

    Raises:
        InvalidRequestError: an id that cannot be used.
    """
    given = headers.get(HEADER)
    if given is None:
        return drawn_id()
    if not _VALID.fullmatch(given):
        raise InvalidRequestError(
            f"the header {HEADER} is {given[:MAX_LEN]!r}, {len(given)} characters; it must have 1 "
            f"to {MAX_LEN} of printable ASCII, and no space",
            HEADER,
        )
    return given


def unique_id(kind: str, request_id: str) -> str:
    """An answer's id, found by the request's, which several clients may send at once."""
    return f"{kind}-{request_id}-{uuid.uuid4().hex[:12]}"
