"""CPU time of Python that a streamed token costs in the replica and in the ingress.

`python -m benchmarks.serving.bench_streams`: the engine is stubbed, and so is Serve between the two
sides; all else is the server's own code. Replica: from the socket of the engine process to the
deltas that Serve would take. Ingress: from these deltas, as many tokens each as they had there, to
the bytes that Serve would send, a chat's HTTP request included. Every text is compared with what
was sent. The loop's clock jumps to the next timer where nothing is to be done, so that a run has
the deltas of one at real pace and none of its waiting: caches are warm, and runs differ by little.
"""

import argparse
import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self

from app.args import SLoRAArgs
from app.generation.backlog import Backlog
from app.generation.client import EngineClient
from app.http.bodies import BodyReader
from app.http.limits import ModelLimits
from app.http.routes import Ingress, api_app
from app.http.service import CompletionService
from app.models.demo import ensure_demo_model
from app.registry.follower import RegistryView
from app.replica.load_meter import LoadMeter
from app.replica.server import EngineServer, gathering_interval
from app.replica.spans import ReplicaSpans
from app.tracing.spans import NO_TRACING
from benchmarks.report import add_output_option, make_row, publish
from slora_core.engine.process import AsyncEngine
from slora_core.engine.protocol import EngineSpec, packed, receive_message
from slora_core.requests import Delta, FinishReason, Request, SamplingParams, StepOutput
from slora_core.text.tokenizer import Tokenizer

# Seconds between two steps of the stubbed engine.
STEP_S = 0.01
MODEL = "smollm2-135m-instruct"


class JumpingLoop(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to what is next: a timer, or the feed's next call."""

    def __init__(self) -> None:
        super().__init__()
        self._now = time.monotonic()
        self._feed: Iterator[None] | None = None
        self._feed_at = 0.0
        self._poll = self._selector.select  # type: ignore[attr-defined]
        self._selector.select = self._select  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._now

    def feed(self, calls: Iterator[None]) -> None:
        """Take one item of `calls` every `STEP_S` from now on, to their end."""
        self._feed, self._feed_at = calls, self._now + STEP_S

    def _select(self, timeout: float | None) -> list[Any]:
        events = self._poll(0)
        if events or timeout == 0:
            return events
        wakes_at = float("inf") if timeout is None else self._now + timeout
        if self._feed is not None and self._feed_at <= wakes_at:
            self._now = max(self._now, self._feed_at)
            self._feed_at += STEP_S
            if next(self._feed, self) is self:
                self._feed = None
            return []
        if timeout is None:
            # A thread has something to say.
            return self._poll(0.001)
        self._now = wakes_at
        return []


class StubEngine:
    """The engine's end of the socket: takes requests, then gives each a token a step."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._requests: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def steps(self, texts: list[list[int]], num_apart: int) -> Iterator[None]:
        """A step an item; requests start over `num_apart` steps, as they would."""
        assert len(self._requests) == len(texts)
        request_ids, self._requests = self._requests, []
        starts = [index * num_apart // len(texts) for index in range(len(texts))]
        for step in range(max(map(len, texts)) + max(starts)):
            output = StepOutput()
            for request_id, text, start in zip(request_ids, texts, starts, strict=True):
                if 0 <= step - start < len(text):
                    is_last = step - start == len(text) - 1
                    ending = FinishReason.LENGTH if is_last else None
                    output.add(request_id, text[step - start], ending)
            self._connection.sendall(packed(output))
            yield

    def num_requests(self) -> int:
        return len(self._requests)

    def _read(self) -> None:
        while True:
            try:
                message = receive_message(self._connection)
            except (EOFError, OSError):
                return
            if isinstance(message, Request):
                self._requests.append(message.request_id)


async def run_replica(
    server: EngineServer, stub: StubEngine, texts: list[list[int]], interval_s: float
) -> tuple[float, list[list[int]]]:
    """CPU seconds of one run, and how many tokens each delta of each stream had."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, JumpingLoop)

    async def read(text: list[int]) -> list[int]:
        received: list[int] = []
        sizes = []
        sampling = SamplingParams(max_tokens=len(text))
        async for delta in server.generate(Request([1, 2, 3], sampling)):
            received += delta.token_ids
            sizes.append(len(delta.token_ids))
        assert received == text
        return sizes

    reading = [asyncio.create_task(read(text)) for text in texts]
    while stub.num_requests() < len(texts):
        await asyncio.sleep(0.001)
    gc.collect()
    began = time.process_time()
    loop.feed(stub.steps(texts, max(1, round(interval_s / STEP_S))))
    sizes = await asyncio.gather(*reading)
    return time.process_time() - began, sizes


class StubHandle:
    """In place of Serve's handle to the replicas: gives each request the deltas of a text."""

    def __init__(self) -> None:
        self.deltas: list[list[Delta]] = []
        self.generate = self

    def options(self, **_: object) -> "StubHandle":
        return self

    def remote(self, request: Request, *_: object, **__: object) -> AsyncIterator[Delta]:
        return self._stream(self.deltas.pop())

    async def _stream(self, deltas: list[Delta]) -> AsyncIterator[Delta]:
        for delta in deltas:
            # As Serve's does, it lets others run.
            await asyncio.sleep(0)
            yield delta


async def run_ingress(
    app: Any, handle: StubHandle, texts: list[list[int]], sizes: list[list[int]], decode: Callable
) -> float:
    """CPU seconds of one run."""
    handle.deltas = [
        list(_deltas(text, counts)) for text, counts in zip(texts, sizes, strict=True)
    ][::-1]
    bodies: list[list[bytes]] = [[] for _ in texts]
    gc.collect()
    began = time.process_time()
    await asyncio.gather(*(_chat(app, len(t), b) for t, b in zip(texts, bodies, strict=True)))
    seconds = time.process_time() - began
    for text, body in zip(texts, bodies, strict=True):
        events = b"".join(body).decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], events[-1]
        choices = [json.loads(event[6:])["choices"][0] for event in events[:-2]]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == decode(text)
    return seconds


def _deltas(text: list[int], sizes: list[int]) -> Iterator[Delta]:
    start = 0
    for size in sizes:
        end = start + size
        yield Delta("r", text[start:end], FinishReason.LENGTH if end == len(text) else None)
        start = end


async def _chat(app: Any, max_tokens: int, body: list[bytes]) -> None:
    """One HTTP request to the ASGI application, whose body's parts are put into `body`."""
    message = {"role": "user", "content": "Tell me of the sea."}
    fields = {"model": MODEL, "messages": [message], "max_tokens": max_tokens, "stream": True}
    request = {"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}
    incoming = [request]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [],
    }

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        return await asyncio.get_running_loop().create_future()

    async def send(message: dict[str, Any]) -> None:
        assert message.get("status", 200) == 200
        body.append(message.get("body", b""))

    await app(scope, receive, send)


class NoRegistry:
    """Of no adapters."""

    async def changes_since(self, position: Any = None) -> Any:
        raise AssertionError("the base model needs no registry")

    wait_for_change = load = unload = changes_since


def make_ingress(tokenizer: Any, handle: StubHandle) -> Any:
    limits = ModelLimits(
        context_len=8192, vocab_size=49152, eos_token_ids=frozenset({2}), page_tokens=16
    )
    registry = NoRegistry()
    backlog = Backlog(max_requests=10**6, max_tokens=10**9)
    client = EngineClient(handle, backlog, failover_timeout_s=0.0)
    view = RegistryView(registry)
    service = CompletionService(MODEL, MODEL, limits, tokenizer, view, client)
    bodies = BodyReader(2**20, 60.0, 2**24)
    ingress = Ingress(service, registry, registry.changes_since, bodies, backlog.check_room)
    return api_app(ingress, lambda app: None)


class PlainText:
    """A tokenizer whose decoding costs nothing: what is left is this project's own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode_chat = tokenizer.encode_chat

    def decoder(self, prompt_ids: list[int]) -> Self:
        return self

    def push(self, token_ids: list[int]) -> str:
        return "x" * len(token_ids)

    decode = push

    def finish(self) -> str:
        return ""


async def measure(args: argparse.Namespace, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Rows of both sides, at each number of streams; the best of several runs."""
    interval = gathering_interval(SLoRAArgs())
    ours, theirs = socket.socketpair()
    stub = StubEngine(theirs)
    engine = AsyncEngine(EngineSpec("no model"), interval)
    await engine.connect(ours)
    # Without Serve, which its constructor asks who it is.
    server = object.__new__(EngineServer)
    server._engine, server._replica_id, server._args = engine, "replica", SLoRAArgs()
    server._tracing, server._spans = NO_TRACING, ReplicaSpans(NO_TRACING, "replica")
    server._meter = LoadMeter("replica", SLoRAArgs().page_tokens)
    rows = []
    for num_streams in args.streams:
        texts = make_texts(tokenizer, num_streams, args.tokens)
        num_tokens = sum(map(len, texts))
        runs = [
            await run_replica(server, stub, texts, interval(num_streams))
            for _ in range(args.repeats)
        ]
        sizes = runs[0][1]
        row = {"num_streams": num_streams, "tokens_per_delta": num_tokens / sum(map(len, sizes))}
        rows.append({"side": "replica", **row, **_figures([run[0] for run in runs], num_tokens)})
        for name, text in (("tokenizer", tokenizer), ("none", PlainText(tokenizer))):
            handle = StubHandle()
            app = make_ingress(text, handle)
            seconds = [
                await run_ingress(app, handle, texts, sizes, text.decode)
                for _ in range(args.repeats)
            ]
            rows.append(
                {"side": "ingress", "decoding": name, **row, **_figures(seconds, num_tokens)}
            )
    engine.close()
    theirs.close()
    return rows


def make_texts(tokenizer: Tokenizer, num_texts: int, num_tokens: int) -> list[list[int]]:
    """Different parts of an English text, in tokens."""
    words = (__doc__ + (measure.__doc__ or "")) * (4 + num_tokens // 100)
    token_ids = tokenizer.encode(" ".join(words.split()), add_special_tokens=False)
    room = len(token_ids) - num_tokens
    return [token_ids[i * 7 % room :][:num_tokens] for i in range(num_texts)]


def _figures(seconds: list[float], num_tokens: int) -> dict[str, float]:
    best, worst = min(seconds), max(seconds)
    return {"us_per_token": 1e6 * best / num_tokens, "worst_us": 1e6 * worst / num_tokens}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--tokens", type=int, default=300, help="of a stream")
    parser.add_argument("--repeats", type=int, default=5)
    add_output_option(parser)
    args = parser.parse_args(argv)
    tokenizer = Tokenizer(ensure_demo_model())
    # What the imports left is no garbage; searching it takes as long as a whole run.
    gc.collect()
    gc.freeze()
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        rows = runner.run(measure(args, tokenizer))
    for row in rows:
        publish(make_row("streams", row, {"step_s": STEP_S, "tokens": args.tokens}, 0), args.output)


if __name__ == "__main__":
    main()
