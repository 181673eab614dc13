"""Spans as the hops of a request make them, and what they are where nobody traces: nothing.

Owns when traces are made at all; the library that makes them is `otel`'s, an extra. A span's parent
is always given: what crosses a process goes with the request, as `Request.trace`.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol

# W3C's headers, traceparent above all, by their names in small letters.
Carrier = Mapping[str, str]
Kind = Literal["server", "client", "internal"]
Value = str | int | float | bool | list[str]

# Any of these says where spans go.
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class NoFailure(Exception):
    """Ends a context from outside, as its owner wants."""


class Span(Protocol):
    """One hop of a request. Times are seconds since the epoch, now where none is given."""

    @property
    def carrier(self) -> Carrier | None:
        """What its children are given; None where it is not recorded, and they need not be."""

    def rename(self, name: str) -> None: ...

    def set(self, name: str, value: Value | None) -> None:
        """None leaves the attribute out."""

    def event(self, name: str, at: float | None = None) -> None: ...

    def end(self, failure: str | None = None, at: float | None = None) -> None:
        """`failure` is the kind of an error, not its words, which may quote a prompt."""


class Tracing(Protocol):
    """Makes the spans of one process."""

    def start(
        self, name: str, parent: Carrier | None, kind: Kind = "internal", at: float | None = None
    ) -> Span:
        """A span under `parent`, or under none where that has no headers of a trace."""

    def close(self) -> None:
        """Hand over the spans that have ended; blocks."""


class _NoSpan:
    carrier = None

    def rename(self, name: str) -> None:
        pass

    def set(self, name: str, value: Value | None) -> None:
        pass

    def event(self, name: str, at: float | None = None) -> None:
        pass

    def end(self, failure: str | None = None, at: float | None = None) -> None:
        pass


class _NoTracing:
    def start(
        self, name: str, parent: Carrier | None, kind: Kind = "internal", at: float | None = None
    ) -> Span:
        return NO_SPAN

    def close(self) -> None:
        pass


NO_SPAN: Span = _NoSpan()
NO_TRACING: Tracing = _NoTracing()


@contextmanager
def ending(span: Span) -> Iterator[Span]:
    """End a span with the context, and with the kind of the error that it fails with."""
    try:
        yield span
    except BaseException as error:
        span.end(failure_of(error))
        raise
    span.end()


def failure_of(error: BaseException) -> str | None:
    """As `Span.end` takes it: None where somebody left, which cancels or closes what runs."""
    is_failure = isinstance(error, Exception) and not isinstance(error, NoFailure)
    return type(error).__name__ if is_failure else None


def tracing_of(part: str) -> Tracing:
    """As OpenTelemetry's variables say for this process, a `part` of the server.

    Raises:
        ValueError: they ask for traces that cannot be made.
    """
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip()
    is_asked = exporter or any(os.environ.get(name) for name in _ENDPOINTS)
    is_off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_off or not is_asked or exporter == "none":
        return NO_TRACING
    try:
        from app.tracing.otel import exporting
    except ImportError as error:
        raise ValueError(
            f"OpenTelemetry's variables ask for traces, and it is not installed ({error}): "
            "pip install 'slora[otel]'"
        ) from error
    return exporting(exporter or "otlp", part)
