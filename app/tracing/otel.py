"""Spans by OpenTelemetry's SDK, set up by its own environment variables.

Owns every use of the library, which the extra `otel` installs. The SDK reads most variables by
itself: sampler, limits, batches, propagators, the exporters' endpoints and headers. What its
automatic set-up adds, the choice of the exporter, is here: that set-up also replaces the process's
metrics, which are Ray's.
"""

import os
from importlib.metadata import entry_points

from opentelemetry import propagate
from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from app.tracing.spans import Carrier, Kind, Span, Value

_KINDS = {
    "server": api.SpanKind.SERVER,
    "client": api.SpanKind.CLIENT,
    "internal": api.SpanKind.INTERNAL,
}

# Exporters of OTLP by the name of its protocol; the first that is installed where none is named.
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def exporting(exporters: str, part: str) -> "OtelTracing":
    """Tracing to exporters by their names, as of OTEL_TRACES_EXPORTER: several with commas.

    Raises:
        ValueError: one is not installed.
    """
    resource = Resource.create({"slora.part": part})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "slora"}))
    provider = TracerProvider(resource=resource)
    for name in exporters.split(","):
        provider.add_span_processor(BatchSpanProcessor(_exporter(name.strip())()))
    return OtelTracing(provider)


def _exporter(name: str) -> type:
    names = [name]
    if name == "otlp":
        protocol = next((os.environ[v] for v in _PROTOCOLS if os.environ.get(v)), None)
        if protocol is not None and protocol not in _OTLP:
            raise ValueError(f"the OTLP protocol is {protocol!r}; it must be {' or '.join(_OTLP)}")
        names = [*_OTLP.values()] if protocol is None else [_OTLP[protocol]]
    for candidate in names:
        for found in entry_points(group="opentelemetry_traces_exporter", name=candidate):
            loaded: type = found.load()
            return loaded
    raise ValueError(
        f"no exporter {' or '.join(names)} of traces is installed, for OTEL_TRACES_EXPORTER "
        f"{name!r}; OTLP's are in opentelemetry-exporter-otlp-proto-http and -grpc"
    )


class OtelTracing:
    """`spans.Tracing` by a provider, which it owns."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("slora")

    def start(
        self, name: str, parent: Carrier | None, kind: Kind = "internal", at: float | None = None
    ) -> Span:
        # Of nothing but what is given: the context of whatever runs here is another request's.
        context = Context() if parent is None else propagate.extract(parent, Context())
        span = self._tracer.start_span(name, context, _KINDS[kind], start_time=_nanoseconds(at))
        return _OtelSpan(span, context)

    def close(self) -> None:
        self._provider.shutdown()


class _OtelSpan:
    def __init__(self, span: api.Span, context: Context) -> None:
        self._span = span
        self.carrier: Carrier | None = None
        if span.is_recording():
            carrier: dict[str, str] = {}
            propagate.inject(carrier, api.set_span_in_context(span, context))
            self.carrier = carrier

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def set(self, name: str, value: Value | None) -> None:
        if value is not None:
            self._span.set_attribute(name, value)

    def event(self, name: str, at: float | None = None) -> None:
        self._span.add_event(name, timestamp=_nanoseconds(at))

    def end(self, failure: str | None = None, at: float | None = None) -> None:
        if failure is not None:
            self._span.set_attribute("error.type", failure)
            self._span.set_status(api.StatusCode.ERROR, failure)
        self._span.end(_nanoseconds(at))


def _nanoseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e9)
