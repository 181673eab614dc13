"""The engine's loop in this process: what it answers to messages, and when it waits for them."""

import asyncio
import os
import select
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from slora_core.adapters.page_layout import plan_layout
from slora_core.adapters.slab_format import AdapterLocation, ExtentId
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.engine.main import EngineLoop, _failed
from slora_core.engine.protocol import (
    AbortRequest,
    AddAdapter,
    Begun,
    Busy,
    Call,
    Reply,
    receive_message,
    send_message,
)
from slora_core.engine.streams import DeltaStreams
from slora_core.errors import (
    AdapterNotFoundError,
    EngineFaultError,
    InvalidRequestError,
    OverloadedError,
    StoreGoneError,
)
from slora_core.requests import (
    Delta,
    FinishReason,
    Request,
    RequestState,
    SamplingParams,
    StepOutput,
)
from tests.factories import make_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of the loop's reader, whose process does not end with it here.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]

SAMPLING = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
ERROR = OverloadedError("too late")


def ignore(request_id: str) -> None:
    """For ids that nobody wants to know here."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("main") / "model", "llama", seed=4)


@pytest.fixture(params=[1, 2])
def engine(request, model_dir: Path) -> Engine:
    """With one step in flight, and with two."""
    config = EngineConfig(
        num_pool_tokens=1024, max_running_requests=1, max_inflight_steps=request.param
    )
    return Engine.from_pretrained(model_dir, config)


class Owner:
    """The other end of the loop's connection."""

    def __init__(self, connection: socket.socket, loop: EngineLoop) -> None:
        self.connection = connection
        self.loop = loop
        self.begun: list[list[str]] = []

    def send(self, *messages: object) -> None:
        for message in messages:
            send_message(self.connection, message)
        # Read before a reply to it is: the loop takes all of its messages first.
        send_message(self.connection, Call(0, "check_integrity"))
        while self.loop._inbox.qsize() < len(messages) + 1:
            pass

    def received(self) -> list[object]:
        """What has come so far, but for the replies to `send`; `begun` has who has begun."""
        messages: list[object] = []
        while select.select([self.connection], [], [], 0)[0]:
            message = receive_message(self.connection)
            if isinstance(message, Begun):
                self.begun.append(message.request_ids)
            elif message != Reply(0):
                messages.append(message)
        return messages


@pytest.fixture
def owner(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Owner]:
    # At the end of the connection the loop ends its process, of which here the thread is enough.
    monkeypatch.setattr(os, "_exit", sys.exit)
    ours, theirs = socket.socketpair()
    before = set(threading.enumerate())
    loop = EngineLoop(theirs, engine)
    [reader] = set(threading.enumerate()) - before
    yield Owner(ours, loop)
    ours.close()
    reader.join(10)
    assert not reader.is_alive()


def _request(name: str, **fields) -> Request:
    return Request([5, 6, 7], SAMPLING, request_id=name, **fields)


def _told(messages: list[object]) -> dict[str, object]:
    """How requests ended."""
    endings: dict[str, object] = {}
    for message in messages:
        assert isinstance(message, StepOutput)
        assert not endings.keys() & message.endings.keys(), "told twice"
        endings |= message.endings
    return endings


def test_a_step_is_one_message_and_nothing_is_none(owner: Owner, engine: Engine) -> None:
    owner.send(_request("a"), _request("b"))
    messages = []
    while engine.has_work or not messages:
        owner.loop.run_once()
        new = owner.received()
        assert len(new) <= 1 and all(new)
        messages += new
    [expected] = engine.generate([_request("c")])
    tokens = [token for message in messages for token in message.token_ids]
    assert tokens == [*expected, *expected]
    assert _told(messages) == {"a": FinishReason.LENGTH, "b": FinishReason.LENGTH}


def test_a_request_refused_after_it_was_queued_reaches_the_client(
    owner: Owner, engine: Engine
) -> None:
    """One that runs and one that waits, beside one that goes on."""

    async def main() -> dict[str, list[Delta]]:
        streams = DeltaStreams(lambda num_streams: 0.0, ignore, ignore)
        opened = {name: streams.open(name) for name in ("running", "waiting", "other")}
        owner.send(*map(_request, opened))
        owner.loop.run_once()
        owner.loop.run_once()
        for name in ("running", "waiting"):
            assert engine.refuse(name, ERROR)
        while engine.has_work:
            owner.loop.run_once()
        messages = owner.received()
        assert _told(messages).keys() == opened.keys()
        for message in messages:
            assert isinstance(message, StepOutput)
            streams.take(message)
        return {name: [delta async for delta in stream] for name, stream in opened.items()}

    deltas = asyncio.run(main())
    for name in ("running", "waiting"):
        *_, last = deltas[name]
        assert isinstance(last.error, OverloadedError) and str(last.error) == "too late"
    assert sum(len(delta.token_ids) for delta in deltas["waiting"]) == 0
    assert sum(len(delta.token_ids) for delta in deltas["running"]) in (1, 2)
    [expected] = engine.generate([_request("again")])
    assert [token for delta in deltas["other"] for token in delta.token_ids] == expected
    assert deltas["other"][-1].finish_reason is FinishReason.LENGTH
    engine.check_integrity()


def test_the_loop_does_not_wait_for_messages_while_a_refusal_is_untold(
    owner: Owner, engine: Engine
) -> None:
    owner.send()
    owner.loop.run_once()
    engine.add_request(_request("r"))
    engine.refuse("r", ERROR)
    # Would wait for ever.
    owner.loop.run_once()
    [(name, error)] = _told(owner.received()).items()
    assert name == "r" and str(error) == "too late"
    assert not engine.has_work


def test_what_cannot_be_queued_is_told_at_once(owner: Owner, engine: Engine) -> None:
    layout = plan_layout(engine.geometry, {(0, 0): 4}, {(0, 0): 1.0})
    # A descriptor that nobody has.
    location = AdapterLocation("gone", layout, ExtentId(os.getpid(), 1 << 30, "token"), 4096, 64)
    owner.send(
        AddAdapter(location),
        _request("gone", adapter_id="gone"),
        _request("unknown", adapter_id="unknown"),
        Request([], SAMPLING, request_id="empty"),
        _request("good"),
    )
    owner.loop.run_once()
    told = _told(owner.received())
    kinds = {"gone": StoreGoneError, "unknown": AdapterNotFoundError, "empty": InvalidRequestError}
    assert {name: type(error) for name, error in told.items()} == kinds
    assert engine.stats().num_running == 1


def test_an_abort_is_told_once_and_only_of_what_is_there(owner: Owner, engine: Engine) -> None:
    owner.send(_request("r"), AbortRequest("unknown"))
    owner.loop.run_once()
    owner.send(AbortRequest("r"), AbortRequest("r"))
    while engine.has_work:
        owner.loop.run_once()
    owner.loop._handle_messages(block=False)
    assert _told(owner.received()) == {"r": FinishReason.ABORT}


def test_an_end_is_told_without_a_traceback_once_clients_hear_of_it(engine: Engine) -> None:
    engine.add_request(_request("a"))
    engine.step()
    failed = _failed(MemoryError("no memory"), engine)
    assert failed.reason == "the engine ended, since it failed: MemoryError('no memory')"
    assert failed.request_ids == ("a",)
    assert _failed(InvalidRequestError("why"), None).reason == "why"


def test_each_request_is_named_once_before_its_first_step(owner: Owner, engine: Engine) -> None:
    owner.send(_request("a"), _request("b"))
    owner.loop.run_once()
    while engine.has_work:
        owner.loop.run_once()
    owner.received()
    # One runs at a time.
    assert owner.begun == [["a"], ["b"]]


def test_a_defect_at_one_message_costs_the_others_nothing(
    owner: Owner, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = plan_layout(engine.geometry, {(0, 0): 4}, {(0, 0): 1.0})
    location = AdapterLocation("a", layout, ExtentId(os.getpid(), 1, "token"), 4096, 64)
    add = engine.scheduler.add

    def fail_to_map(location: AdapterLocation) -> None:
        raise OSError(12, "Cannot allocate memory")

    def fail_to_add(request: RequestState) -> None:
        add(request)
        assert request.request_id != "bad", "a defect"

    monkeypatch.setattr(owner.loop._slabs, "open", fail_to_map)
    monkeypatch.setattr(engine.scheduler, "add", fail_to_add)
    owner.send(AddAdapter(location), _request("a", adapter_id="a"), _request("bad"), _request("c"))
    messages = []
    while not messages or engine.has_work:
        owner.loop.run_once()
        messages += owner.received()
    told = _told(messages)
    assert "Cannot allocate memory" in str(told["a"]) and "a defect" in str(told["bad"])
    # Of the former a new lease is tried.
    assert isinstance(told["a"], StoreGoneError) and isinstance(told["bad"], EngineFaultError)
    assert told["c"] is FinishReason.LENGTH
    engine.check_integrity()


def test_an_idle_loop_captures_what_steps_lacked_and_says_so(
    owner: Owner, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [1, 2]
    monkeypatch.setattr(Engine, "has_late_graphs", property(lambda engine: bool(wanted)))
    monkeypatch.setattr(engine, "capture_late_graph", wanted.pop)
    monkeypatch.setattr("slora_core.engine.main.IDLE_S", 1000.0)
    owner.send(_request("a"))
    owner.loop.run_once()
    while engine.has_work:
        owner.loop.run_once()
    # Nor just after work, be it that messages come.
    owner.send()
    owner.loop.run_once()
    assert len(wanted) == 2
    owner.received()
    monkeypatch.setattr("slora_core.engine.main.IDLE_S", 0.01)
    owner.loop.run_once()
    owner.loop.run_once()
    assert wanted == []
    assert [type(message) for message in owner.received()] == [Busy, Busy]
