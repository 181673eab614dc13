"""The spans of a request through the ingress and a replica, with the engine and Serve stubbed."""

import asyncio
import json
import time
from contextlib import asynccontextmanager, nullcontext

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from app.args import SLoRAArgs
from app.generation.backlog import Backlog
from app.generation.client import EngineClient
from app.http.bodies import BodyReader
from app.http.routes import Ingress, api_app
from app.http.service import CompletionService
from app.registry.follower import RegistryView
from app.replica.load_meter import LoadMeter
from app.replica.server import EngineServer
from app.replica.spans import ReplicaSpans
from app.tracing.otel import OtelTracing
from slora_core.engine.streams import DeltaStreams
from slora_core.errors import EngineDeadError, StoreFullError
from slora_core.requests import FinishReason, StepOutput
from tests.app.fakes import FakeRegistry
from tests.app.http.test_routes import LIMITS, tokenizer
from tests.tiny_tokenizer import byte_ids

__all__ = ["tokenizer"]

PATH = "/v1/completions"
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
TEXT = byte_ids(b"hello")
# Of what the engine says, after the request has come to it: its beginning, first token and end.
BEGUN_S, FIRST_TOKEN_S, ENDED_S = 1.0, 2.5, 4.0


class StubEngine:
    """Gives each request a text by the clock that it says, or dies after its first token."""

    def __init__(self):
        self.streams = DeltaStreams(lambda num: 0.0, lambda request_id: None, lambda left: None)
        self.requests = []
        self.dies = False
        # Whether it ever begins what it is given.
        self.is_stuck = False
        # Seconds since the epoch, of each request.
        self.came_at = []

    def generate(self, request):
        self.requests.append(request)
        self.came_at.append(time.time())
        stream = self.streams.open(request.request_id)
        if not self.is_stuck:
            asyncio.get_running_loop().call_soon(self._run, request, stream)
        return stream

    def close(self):
        pass

    def _run(self, request, stream):
        name, came_at = request.request_id, self.came_at[-1]
        tokens = TEXT[len(request.output_ids) :]
        self.streams.begun([name], came_at + BEGUN_S)
        self.streams.take(StepOutput([name], tokens[:1], at=came_at + FIRST_TOKEN_S))
        if not self.dies:
            ends = {name: FinishReason.LENGTH}
            ids = [name] * len(tokens[1:])
            self.streams.take(StepOutput(ids, tokens[1:], ends, at=came_at + ENDED_S))
        else:
            stream.end(EngineDeadError("it died"), came_at + ENDED_S)


class StubLeases:
    def __init__(self):
        self.error = None

    @asynccontextmanager
    async def hold(self, record):
        if self.error is not None:
            raise self.error
        yield


class StubHandle:
    """In place of Serve between ingress and replicas; what crosses is pickled in life."""

    def __init__(self, servers):
        self.servers = list(servers)
        self.generate = self

    def options(self, **_):
        return self

    def remote(self, request, record, avoid_replica):
        server = self.servers.pop(0) if len(self.servers) > 1 else self.servers[0]
        return Responses(server.generate(request, record, avoid_replica))


class Responses:
    def __init__(self, deltas):
        self.deltas = deltas

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await anext(self.deltas)

    def cancel(self):
        pass


class World:
    """An ingress and two replicas, each with a tracer of its own and one exporter."""

    def __init__(self, tokenizer):
        self.exporter = InMemorySpanExporter()
        self.engines = [StubEngine(), StubEngine()]
        self.leases = StubLeases()
        # One that goes shuts the exporter.
        self.servers = [self._server(index) for index in range(2)]
        self._tokenizer = tokenizer

    def _tracing(self):
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        return OtelTracing(provider)

    def _server(self, index):
        # Without Serve, which its constructor asks who it is.
        server = object.__new__(EngineServer)
        server._engine, server._leases = self.engines[index], self.leases
        server._replica_id, server._args = f"replica-{index}", SLoRAArgs()
        server._meter = LoadMeter(server._replica_id, server._args.page_tokens)
        server._tracing = self._tracing()
        server._spans = ReplicaSpans(server._tracing, server._replica_id)
        return server

    def app(self):
        handle = StubHandle(self.servers)
        tracing, backlog = self._tracing(), Backlog(100, 10_000)
        registry = FakeRegistry("sql")
        client = EngineClient(handle, backlog, failover_timeout_s=5.0)
        view = RegistryView(registry)
        service = CompletionService(
            "base", "/base", LIMITS, self._tokenizer, view, client, tracing=tracing
        )
        ingress = Ingress(service, registry, None, BodyReader(10_000, 5.0, 2**24), lambda: None)
        return api_app(ingress, lambda app: nullcontext(), tracing)

    def post(self, body, traceparent=TRACEPARENT, path=PATH):
        async def run():
            transport = httpx.ASGITransport(self.app())
            async with httpx.AsyncClient(transport=transport, base_url="http://slora") as client:
                headers = {} if traceparent is None else {"traceparent": traceparent}
                return await client.post(path, json=body, headers=headers)

        return asyncio.run(run())

    @property
    def spans(self):
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time)

    def named(self, name):
        return [span for span in self.spans if span.name == name]

    def tree(self):
        """Each span's name with its children's, as nested pairs."""

        def below(span_id):
            return [
                (span.name, below(span.context.span_id))
                for span in self.spans
                if span.parent is not None and span.parent.span_id == span_id
            ]

        [root] = [span for span in self.spans if span.kind is SpanKind.SERVER]
        return root.name, below(root.context.span_id)


@pytest.fixture
def world(tokenizer):
    return World(tokenizer)


def body(**fields):
    return {"model": "sql", "prompt": "hi", "max_tokens": len(TEXT), **fields}


REPLICA = [("lease adapter", []), ("engine queue", []), ("engine run", [])]


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_a_hop(world, stream):
    response = world.post(body(stream=stream))
    assert response.status_code == 200 and "hello"[0] in response.text
    assert world.tree() == (f"POST {PATH}", [("attempt", REPLICA)])
    assert {span.context.trace_id for span in world.spans} == {int(TRACE_ID, 16)}
    [root] = world.named(f"POST {PATH}")
    assert root.parent.span_id == int(PARENT_ID, 16) and root.parent.is_remote
    expected = {
        "http.request.method": "POST",
        "http.route": PATH,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "sql",
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ("length",),
        "slora.adapter_version": 1,
        "slora.moves": 0,
    }
    assert {name: root.attributes[name] for name in expected} == expected
    [attempt] = world.named("attempt")
    [request] = world.engines[0].requests
    assert attempt.attributes["slora.attempt_id"] == request.request_id
    assert [event.name for event in attempt.events] == ["first token"]
    assert all(span.status.status_code is StatusCode.UNSET for span in world.spans)


def test_the_engines_times_are_the_spans(world):
    world.post(body())
    [queue], [run] = world.named("engine queue"), world.named("engine run")
    came_at = round(world.engines[0].came_at[0] * 1e9)
    assert 0 <= queue.start_time - came_at < 1e9 * BEGUN_S
    begun, first, ended = (
        round((world.engines[0].came_at[0] + seconds) * 1e9)
        for seconds in (BEGUN_S, FIRST_TOKEN_S, ENDED_S)
    )
    assert queue.end_time == run.start_time == begun and run.end_time == ended
    assert [(event.name, event.timestamp) for event in run.events] == [("first token", first)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failover_is_two_attempts_of_one_request(world, stream):
    world.engines[0].dies = True
    assert "error" not in world.post(body(stream=stream)).text
    assert world.tree() == (f"POST {PATH}", [("attempt", REPLICA), ("attempt", REPLICA)])
    first, second = world.named("attempt")
    assert first.status.status_code is StatusCode.ERROR
    assert first.attributes["error.type"] == "EngineDeadError"
    assert second.status.status_code is StatusCode.UNSET
    moved = {"slora.moves": 1, "slora.tokens_before": 1}
    assert {name: second.attributes[name] for name in moved} == moved
    runs = world.named("engine run")
    assert [run.attributes["slora.replica_id"] for run in runs] == ["replica-0", "replica-1"]
    assert [run.attributes.get("error.type") for run in runs] == ["EngineDeadError", None]
    [root] = world.named(f"POST {PATH}")
    assert root.status.status_code is StatusCode.UNSET and root.attributes["slora.moves"] == 1


def test_several_prompts_are_attempts_of_one_request(world):
    world.post(body(prompt=["a", "b", "c"]))
    name, attempts = world.tree()
    assert [name for name, _ in attempts] == ["attempt"] * 3
    assert len({span.attributes["slora.attempt_id"] for span in world.named("attempt")}) == 3


def test_the_base_model_has_no_lease(world):
    world.post(body(model="base"))
    assert world.tree() == (f"POST {PATH}", [("attempt", REPLICA[1:])])


def test_a_lease_that_is_refused(world):
    world.leases.error = StoreFullError("full")
    assert world.post(body()).status_code == 503
    assert world.tree() == (f"POST {PATH}", [("attempt", [("lease adapter", [])])])
    for span in world.spans:
        assert span.status.status_code is StatusCode.ERROR
    [root] = world.named(f"POST {PATH}")
    assert root.attributes["error.type"] == "ServiceUnavailableError"


def test_a_client_that_is_wrong_is_no_failure(world):
    assert world.post(body(model="nobody's")).status_code == 404
    [root] = world.spans
    assert root.status.status_code is StatusCode.UNSET
    assert root.attributes["http.response.status_code"] == 404


def test_a_stop_string_is_no_failure(world):
    world.post(body(stop="ll"))
    assert len(world.spans) == 5
    assert all(span.status.status_code is StatusCode.UNSET for span in world.spans)


def test_a_client_that_leaves_the_queue(world):
    world.engines[0].is_stuck = True

    async def run():
        request = {"type": "http.request", "body": json.dumps(body()).encode()}
        incoming = [request, {"type": "http.disconnect"}]

        async def receive():
            if len(incoming) == 1:
                await asyncio.sleep(0.05)
            return incoming.pop(0)

        async def send(message):
            pass

        headers = [(b"traceparent", TRACEPARENT.encode())]
        scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers}
        await world.app()({**scope, "raw_path": b"", "query_string": b""}, receive, send)

    asyncio.run(run())
    assert world.tree() == (f"POST {PATH}", [("attempt", REPLICA[:2])])
    assert all(span.status.status_code is StatusCode.UNSET for span in world.spans)


def test_without_a_clients_trace_one_begins(world):
    world.post(body(), traceparent=None)
    [root] = world.named(f"POST {PATH}")
    assert root.parent is None and len({span.context.trace_id for span in world.spans}) == 1


@pytest.mark.parametrize("header", ["nonsense", f"00-{'0' * 32}-{PARENT_ID}-01"])
def test_a_header_that_is_no_trace_is_ignored(world, header):
    assert world.post(body(), header).status_code == 200
    [root] = world.named(f"POST {PATH}")
    assert root.parent is None


def test_a_trace_that_is_not_sampled_costs_nothing_behind_the_ingress(world):
    world.post(body(), f"00-{TRACE_ID}-{PARENT_ID}-00")
    assert world.spans == []
    assert [request.trace for request in world.engines[0].requests] == [None]


def test_no_word_of_a_request_is_in_a_span(world):
    marker = "xyzzy"
    for fields in ({"prompt": marker}, {"stop": marker}, {"model": marker}, {marker: 1}):
        world.post(body(**fields))
    world.post({}, path=f"/v1/{marker}")
    assert len(world.spans) > 5
    assert all(marker not in span.to_json() for span in world.spans)
