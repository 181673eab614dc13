"""Messages between an engine process and the process that owns it, pickled over one socket.

`engine.process` sends requests and orders, `engine.main` one `StepOutput` a step. A request is sent
as it is, `requests.Request`; the adapter that it names was sent once before, as `AddAdapter`.
"""

import pickle
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.adapters.slab_format import AdapterLocation
from slora_core.config import EngineConfig


@dataclass(frozen=True)
class EngineSpec:
    """What an engine process is started with."""

    model_path: str
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    engine: EngineConfig = field(default_factory=EngineConfig)
    # CPU threads of the engine's math; None takes every core the process may use.
    num_threads: int | None = None
    # Seconds without a sign of life after which the process is taken for hung and killed: longer
    # than its longest step, which on a CPU is a step of prompts of a large model.
    stall_s: float = 60.0


@dataclass(frozen=True)
class EngineInfo:
    """What a started engine says of itself."""

    pid: int
    num_pages: int
    page_tokens: int
    # Largest prompt + output, tokens.
    context_len: int
    geometry: AdapterGeometry


@dataclass(frozen=True)
class Begun:
    """The engine is about to compute these requests for the first time."""

    request_ids: list[str]
    # Seconds since the epoch.
    at: float = field(default_factory=time.time, compare=False)


@dataclass(frozen=True)
class Busy:
    """The engine will not answer for up to so many seconds, and does not hang."""

    seconds: float
    reason: str


@dataclass(frozen=True)
class AddAdapter:
    """An adapter's host pages, for the requests after it, until `release_adapter_source`."""

    location: AdapterLocation


@dataclass(frozen=True)
class AbortRequest:
    request_id: str


@dataclass(frozen=True)
class DropAdapter:
    adapter_id: str


Action = Literal["ping", "stats", "check_integrity", "release_adapter_source"]


@dataclass(frozen=True)
class Call:
    """A request for one `Reply` with the same call_id."""

    call_id: int
    action: Action
    argument: str = ""


@dataclass(frozen=True)
class Reply:
    call_id: int
    value: object = None
    # Text of the failure, None where the call succeeded.
    error: str | None = None


@dataclass(frozen=True)
class Failed:
    """The engine did not start, or died of a defect; the process exits after sending it."""

    reason: str
    # Of the steps that it died in.
    request_ids: tuple[str, ...] = ()


# Before each message: its length in bytes.
_LENGTH = struct.Struct("!Q")


def packed(message: object) -> bytes:
    """A message as it is sent.

    Plain pickle: multiprocessing's would have torch move tensors to shared memory of the sender,
    and a message must outlive it.
    """
    payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(payload)) + payload


def send_message(connection: socket.socket, message: object) -> None:
    """Write one message.

    Raises:
        OSError: the other end is closed.
    """
    connection.sendall(packed(message))


def receive_message(connection: socket.socket) -> Any:
    """Wait for one message.

    Raises:
        EOFError, OSError: the other end is closed.
    """
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    return pickle.loads(_receive(connection, length))


def _receive(connection: socket.socket, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        received = connection.recv_into(view)
        if not received:
            raise EOFError
        view = view[received:]
    return data


class MessageCutter:
    """Cuts what a socket gives, in pieces of any size, into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def push(self, data: bytes) -> list[Any]:
        """The messages that are whole now, in order."""
        messages = []
        self._data += data
        start = 0
        while len(self._data) - start >= _LENGTH.size:
            first = start + _LENGTH.size
            end = first + _LENGTH.unpack_from(self._data, start)[0]
            if end > len(self._data):
                break
            with memoryview(self._data) as view:
                messages.append(pickle.loads(view[first:end]))
            start = end
        del self._data[:start]
        return messages
