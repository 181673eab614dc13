"""An HTTP client that costs next to nothing: it keeps what comes, and reads it when all is over.

For measurements of a server that shares its cores with its client. It knows chunked answers and
OpenAI's events, and judges no text; `load_generator` is the one for everything else.
"""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

ANSWER_TIMEOUT_S = 60.0

_HEAD_END = b"\r\n\r\n"
# The last chunk, after the line's end of the one before. No event has such bytes.
_LAST_CHUNK = b"\r\n0\r\n\r\n"


class BadAnswerError(Exception):
    """An answer that is no whole stream of events with status 200."""


@dataclass(frozen=True)
class RawAnswer:
    """What came for one request; times are of the loop's clock, in seconds."""

    sent_at: float
    # When its first event was there, None: never.
    first_at: float | None
    ended_at: float
    data: bytes


@dataclass(frozen=True)
class StreamedText:
    """What an answer says."""

    text: str
    # Events that had some of it.
    num_pieces: int
    finish_reason: str | None


class RawConnection(asyncio.Protocol):
    """One connection, kept open, with one request at a time."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._first_at: float | None = None
        self._transport: Any = None
        self._ended: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, url: str) -> Self:
        address = urlsplit(url)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, address.hostname, address.port)
        return connection

    async def ask(self, request: bytes) -> RawAnswer:
        """Send what `post` made and wait for the end of the answer.

        Raises:
            ConnectionError: the server has closed the connection.
            TimeoutError: it does not answer, or not to the end.
        """
        assert self._transport is not None and self._ended is None
        self._data.clear()
        self._first_at = None
        self._ended = asyncio.get_running_loop().create_future()
        sent_at = time.monotonic()
        self._transport.write(request)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._ended
        finally:
            self._ended = None
        return RawAnswer(sent_at, self._first_at, time.monotonic(), bytes(self._data))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self._first_at is None and b"data:" in self._data:
            self._first_at = time.monotonic()
        if self._is_whole() and self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(ConnectionError(f"closed: {bytes(self._data[-500:])!r}"))

    def _is_whole(self) -> bool:
        if self._data.endswith(_LAST_CHUNK):
            return True
        if self._first_at is not None:
            return False
        # An error has a length.
        head, found, body = self._data.partition(_HEAD_END)
        length = _header(bytes(head), b"content-length")
        return bool(found) and length is not None and len(body) >= int(length)


def post(url: str, path: str, body: dict[str, Any]) -> bytes:
    """A request as `RawConnection.ask` sends it."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def read_stream(data: bytes) -> StreamedText:
    """The text of an answer to a streamed chat.

    Raises:
        BadAnswerError: it is none, an error, or not whole.
    """
    head, _, body = data.partition(_HEAD_END)
    status = head.split(b" ", 2)[1]
    if status != b"200" or _header(head, b"transfer-encoding") != b"chunked":
        raise BadAnswerError(data[:1000].decode(errors="replace"))
    events = _chunks(body).decode().split("\n\n")
    if events[-2:] != ["data: [DONE]", ""]:
        raise BadAnswerError(f"the stream ends with {events[-2:]}")
    texts, finish_reason = [], None
    for event in events[:-2]:
        if event.startswith(":"):
            continue
        try:
            [choice] = json.loads(event.removeprefix("data:"))["choices"]
            finish_reason = choice["finish_reason"] or finish_reason
            texts.append(choice["delta"].get("content", ""))
        except (ValueError, KeyError, TypeError):
            raise BadAnswerError(f"no event of a chat: {event[:1000]}") from None
    return StreamedText("".join(texts), sum(map(bool, texts)), finish_reason)


def _header(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.lower() == name:
            return value.strip().lower()
    return None


def _chunks(body: bytes) -> bytes:
    """What a chunked body holds."""
    parts = []
    start = 0
    while True:
        end = body.index(b"\r\n", start)
        length = int(body[start:end], 16)
        if not length:
            return b"".join(parts)
        start = end + 2 + length + 2
        parts.append(body[end + 2 : start - 2])
