"""Messages between an engine process and the process that owns it, pickled over one connection.

`engine_process` sends the requests, `engine_main` the replies.
"""

import pickle
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.adapters.slab_format import AdapterLocation
from slora_core.config import EngineConfig
from slora_core.errors import SLoRAError
from slora_core.requests import RequestOutput, SamplingParams


@dataclass(frozen=True)
class EngineSpec:
    """What an engine process is started with."""

    model_path: str
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    engine: EngineConfig = field(default_factory=EngineConfig)
    # CPU threads of the engine's math; None takes every core the process may use.
    num_threads: int | None = None


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
class AddRequest:
    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    # Where the adapter's host pages lie; None is the base model.
    adapter: AdapterLocation | None


@dataclass(frozen=True)
class AbortRequest:
    request_id: str


@dataclass(frozen=True)
class DropAdapter:
    adapter_id: str


Action = Literal["stats", "check_integrity", "release_adapter_source"]


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
class StepOutputs:
    """Everything one step produced, in one message."""

    outputs: list[RequestOutput]


@dataclass(frozen=True)
class Refused:
    """A request that was not queued, with the reason to raise to its caller."""

    request_id: str
    error: SLoRAError


@dataclass(frozen=True)
class Failed:
    """The engine did not start, or died of a defect; the process exits after sending it."""

    reason: str


def send_message(connection: Connection, message: object) -> None:
    """Write one message.

    Plain pickle: the connection's own `send` would have torch move tensors to shared memory of
    the sender, and a message must outlive it.

    Raises:
        OSError: the other end is closed.
    """
    connection.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive_message(connection: Connection) -> Any:
    """Wait for one message.

    Raises:
        EOFError, OSError: the other end is closed.
    """
    return pickle.loads(connection.recv_bytes())
