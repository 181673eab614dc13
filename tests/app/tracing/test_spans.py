"""When requests are traced, as OpenTelemetry's variables say."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from app.tracing.otel import OtelTracing
from app.tracing.spans import NO_SPAN, NO_TRACING, tracing_of


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("TRACES_EXPORTER", "SDK_DISABLED", "EXPORTER_OTLP_ENDPOINT", "SERVICE_NAME"):
        monkeypatch.delenv(f"OTEL_{name}", raising=False)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"TRACES_EXPORTER": "none", "EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"},
        {"TRACES_EXPORTER": "console", "SDK_DISABLED": "true"},
    ],
)
def test_where_nothing_asks_for_traces_there_are_none(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    tracing = tracing_of("ingress")
    assert tracing is NO_TRACING
    assert tracing.start("x", {"traceparent": "00-" + "1" * 32 + "-" + "1" * 16 + "-01"}) is NO_SPAN
    assert NO_SPAN.carrier is None


@pytest.mark.parametrize("service", [None, "lora-tenants"])
def test_the_exporter_that_is_asked_for(monkeypatch, service):
    exporter = InMemorySpanExporter()
    installed = {"otlp_proto_grpc": [SimpleNamespace(load=lambda: lambda: exporter)]}
    monkeypatch.setattr(
        "app.tracing.otel.entry_points", lambda group, name: installed.get(name, [])
    )
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    if service is not None:
        monkeypatch.setenv("OTEL_SERVICE_NAME", service)
    tracing = tracing_of("ingress")
    tracing.start("the hop", None).end()
    tracing.close()
    [span] = exporter.get_finished_spans()
    told = span.resource.attributes
    assert (span.name, told["slora.part"]) == ("the hop", "ingress")
    assert told["service.name"] == (service or "slora")


def test_spans_can_be_printed(monkeypatch):
    """By the SDK's own exporter, found as an installed one."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    tracing = tracing_of("ingress")
    assert isinstance(tracing, OtelTracing) and tracing.start("x", None).carrier is not None
    tracing.close()


def test_the_sampler_that_is_asked_for(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    tracing = tracing_of("ingress")
    assert tracing.start("x", None).carrier is None
    tracing.close()


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_an_exporter_that_is_not_installed(monkeypatch, protocol):
    monkeypatch.setattr("app.tracing.otel.entry_points", lambda **_: [])
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    with pytest.raises(ValueError, match="opentelemetry-exporter-otlp-proto-http"):
        tracing_of("engine")


def test_a_protocol_that_there_is_not(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(ValueError, match="'http/json'; it must be http/protobuf or grpc"):
        tracing_of("engine")


def test_without_the_extra(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setitem(sys.modules, "app.tracing.otel", None)
    with pytest.raises(ValueError, match=r"slora\[otel\]"):
        tracing_of("engine")


def test_where_nobody_asks_nothing_is_loaded():
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, app.tracing.spans as s; s.tracing_of('x'); print(*sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "app.tracing.spans" in loaded
    assert not [name for name in loaded if name.startswith("opentelemetry")]
