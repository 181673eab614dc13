"""An open-loop HTTP client: sends requests when they are due, streams the answers, keeps times.

It never waits for an answer before it sends the next request. It knows the OpenAI API's streams
and nothing of traces or models; `load_summary` makes figures of what it records.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

# Statuses by which a server says that it is too busy: the request was refused, not lost.
ABORT_STATUSES = (429, 503)


@dataclass(frozen=True)
class PlannedRequest:
    """One request to send: a body of /v1/completions or /v1/chat/completions."""

    # Seconds after the start.
    due_s: float
    body: dict[str, Any]
    path: str = "/v1/completions"


@dataclass(frozen=True)
class LoadLimits:
    """What bounds a run, so that it ends whatever the server does."""

    # Requests open at once; one that comes due beyond it is not sent, and recorded as such.
    max_in_flight: int = 2000
    # Seconds from sending a request to its last token.
    request_timeout_s: float = 300.0
    # Seconds after the last request was due; what is open then is given up.
    drain_timeout_s: float = 300.0


@dataclass
class RequestRecord:
    """What happened to one request; times are seconds after the start, None: never."""

    index: int
    model: str
    due_s: float
    sent_s: float | None = None
    # Arrival of each piece of text. A server may put several tokens into one.
    piece_s: list[float] = field(default_factory=list)
    end_s: float | None = None
    status: int | None = None
    text: str = ""
    finish_reason: str | None = None
    # From the usage at the end of the stream.
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    # None: answered to the end. "refused": too busy, by its status. Else what went wrong:
    # "connect", "timeout", "disconnect", "status", "stream_error" (the server told one),
    # "bad_event" (not as OpenAI's), "no_usage", "not_sent".
    error: str | None = None
    # The server's words, or the client library's.
    error_detail: str = ""

    @property
    def is_answered(self) -> bool:
        return self.end_s is not None and self.error is None

    @property
    def first_token_s(self) -> float | None:
        """Seconds from sending to the first piece of text."""
        if self.sent_s is None or not self.piece_s:
            return None
        return self.piece_s[0] - self.sent_s


class RequestFailedError(Exception):
    """Ends one request with an error kind."""

    def __init__(self, kind: str, detail: str) -> None:
        self.kind = kind
        super().__init__(detail)


class LoadGenerator:
    """Sends planned requests to one server; `on_change` hears of every sent and ended request."""

    def __init__(
        self,
        url: str,
        limits: LoadLimits | None = None,
        on_change: Callable[[RequestRecord], None] = lambda record: None,
    ) -> None:
        self._url = url
        self._limits = limits or LoadLimits()
        self._on_change = on_change
        self._start = 0.0
        # Reading the certificates takes longer than all else of a client.
        self._ssl = httpx.create_ssl_context()
        self._clients = AsyncExitStack()
        self._idle_clients: list[httpx.AsyncClient] = []

    async def run(self, planned: Sequence[PlannedRequest]) -> list[RequestRecord]:
        """Send everything and wait for the answers; a record for each request, in order."""
        records = [
            RequestRecord(index, str(request.body.get("model")), request.due_s)
            for index, request in enumerate(planned)
        ]
        order = sorted(range(len(planned)), key=lambda index: planned[index].due_s)
        async with AsyncExitStack() as clients:
            self._clients = clients
            self._idle_clients = []
            self._start = time.monotonic()
            running: set[asyncio.Task[None]] = set()
            for index in order:
                await asyncio.sleep(max(0.0, planned[index].due_s - self._now()))
                if len(running) >= self._limits.max_in_flight:
                    self._fail(records[index], "not_sent", f"{len(running)} requests are open")
                    continue
                task = asyncio.create_task(self._send(planned[index], records[index]))
                running.add(task)
                task.add_done_callback(running.discard)
            await self._drain(running)
        return records

    @contextmanager
    def _client(self) -> Iterator[httpx.AsyncClient]:
        """A client that no other request uses.

        Not one for all: at every request and at its end, httpx looks at each connection of a
        client, which at 500 requests takes it some 10 ms.
        """
        client = self._idle_clients.pop() if self._idle_clients else self._new_client()
        try:
            yield client
        finally:
            self._idle_clients.append(client)

    def _new_client(self) -> httpx.AsyncClient:
        client = httpx.AsyncClient(
            base_url=self._url,
            verify=self._ssl,
            timeout=httpx.Timeout(self._limits.request_timeout_s, connect=10.0),
            # Proxies of the environment are not for us.
            trust_env=False,
        )
        self._clients.push_async_callback(client.aclose)
        return client

    async def _drain(self, running: set["asyncio.Task[None]"]) -> None:
        if running:
            # `running` shrinks as tasks end; wait keeps its own copy.
            _, late = await asyncio.wait(running, timeout=self._limits.drain_timeout_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late)

    async def _send(self, request: PlannedRequest, record: RequestRecord) -> None:
        record.sent_s = self._now()
        self._on_change(record)
        try:
            async with asyncio.timeout(self._limits.request_timeout_s):
                with self._client() as client:
                    await self._stream(client, request, record)
        except RequestFailedError as error:
            self._fail(record, error.kind, str(error))
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._fail(record, "connect", repr(error))
        except (TimeoutError, httpx.TimeoutException):
            self._fail(record, "timeout", f"over {self._limits.request_timeout_s} s")
        except httpx.TransportError as error:
            self._fail(record, "disconnect", repr(error))
        except asyncio.CancelledError:
            # Only `_drain` cancels.
            self._fail(record, "timeout", f"over {self._limits.drain_timeout_s} s after the last")
        else:
            record.end_s = self._now()
            self._on_change(record)

    async def _stream(
        self, client: httpx.AsyncClient, request: PlannedRequest, record: RequestRecord
    ) -> None:
        body = {**request.body, "stream": True, "stream_options": {"include_usage": True}}
        async with client.stream("POST", request.path, json=body) as response:
            record.status = response.status_code
            if response.status_code != 200:
                kind = "refused" if response.status_code in ABORT_STATUSES else "status"
                text = (await response.aread()).decode(errors="replace")
                raise RequestFailedError(kind, f"{response.status_code}: {text[:500]}")
            is_done = False
            async for data in sse_events(response):
                is_done = data == "[DONE]"
                if not is_done:
                    self._read_event(data, record)
        if not is_done:
            raise RequestFailedError("disconnect", "the stream ended without [DONE]")
        if not record.num_output_tokens:
            raise RequestFailedError("no_usage", "the stream told no completion_tokens")

    def _read_event(self, data: str, record: RequestRecord) -> None:
        try:
            event = json.loads(data)
            if "error" in event:
                raise RequestFailedError("stream_error", json.dumps(event["error"])[:500])
            self._take_event(event, record)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RequestFailedError("bad_event", data[:500]) from None

    def _take_event(self, event: dict[str, Any], record: RequestRecord) -> None:
        for choice in event["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content")
            # The last token may have no text, an end of sequence for one.
            if text or (choice["finish_reason"] and not record.piece_s):
                record.piece_s.append(self._now())
            record.text += text or ""
            record.finish_reason = choice["finish_reason"] or record.finish_reason
        usage = event.get("usage")
        if usage:
            record.num_prompt_tokens = usage["prompt_tokens"]
            record.num_output_tokens = usage["completion_tokens"]

    def _fail(self, record: RequestRecord, kind: str, detail: str) -> None:
        record.error = kind
        record.error_detail = detail
        record.end_s = self._now()
        self._on_change(record)

    def _now(self) -> float:
        return time.monotonic() - self._start


async def sse_events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of each server-sent event of a stream."""
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line.removeprefix("data:").strip()
