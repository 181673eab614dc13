"""One HTTP request and what is known of it at its end, whatever that is.

Owns the middleware that gives every request its id and tells observers of each that is over.
Handlers put what they learn into the `Exchange` of their request; it knows no routes and no models.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from app.http.errors import ApiError, api_error
from app.http.request_ids import request_id_of
from app.http.responses import Answer
from app.tracing.spans import Span, Tracing
from slora_core.errors import InvalidRequestError

_KEY = "slora.exchange"


@dataclass
class Exchange:
    """One HTTP request, as far as it has come."""

    request_id: str
    method: str
    span: Span
    # Of `time.monotonic`.
    began_at: float = field(default_factory=time.monotonic)
    # Of the route that took it, not what the client wrote; None where there is none.
    route: str | None = None
    # None where nothing was answered: its client had left.
    status: int | None = None
    # What was told instead of an answer; one that came late is the answer's own.
    error: ApiError | None = None
    # Of a completion or a chat, once it is prepared.
    answer: Answer | None = None


Observer = Callable[[Exchange], None]


def exchange_of(request: Request) -> Exchange:
    """The exchange of a request under `Exchanges`."""
    exchange = request.scope[_KEY]
    assert isinstance(exchange, Exchange)
    return exchange


class Exchanges:
    """ASGI middleware; each of `observers` is told of each request that is over."""

    def __init__(self, app: ASGIApp, tracing: Tracing, observers: Sequence[Observer]) -> None:
        self._app = app
        self._tracing = tracing
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            request_id = request_id_of(request.headers)
        except InvalidRequestError as error:
            # Without a line in the log: there is no id for one.
            await api_error(error).response()(scope, receive, send)
            return
        span = self._tracing.start(request.method, request.headers, "server")
        exchange = scope[_KEY] = Exchange(request_id, request.method, span)
        try:
            await self._app(scope, receive, send)
        finally:
            for observer in self._observers:
                observer(exchange)
