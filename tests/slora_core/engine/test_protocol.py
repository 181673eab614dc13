"""Messages come out of a byte stream whole and in order, however it is cut."""

import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_core.engine.protocol import MessageCutter, packed, receive_message, send_message
from slora_core.errors import EngineDeadError, InvalidRequestError
from slora_core.requests import Request, SamplingParams, StepOutput

MESSAGES = [
    Request([1, 2, 3], SamplingParams(), "adapter", [4], request_id="r"),
    StepOutput(["r"], [5], {"s": InvalidRequestError("too long", "max_tokens")}, {"r": 16}),
    "",
    b"x" * 100_000,
]


def _same(actual: list[object]) -> None:
    assert [repr(message) for message in actual] == [repr(message) for message in MESSAGES]


@settings(deadline=None)
@given(st.lists(st.integers(1, 60_000), max_size=20))
def test_messages_are_cut_from_pieces_of_any_size(sizes: list[int]) -> None:
    data = b"".join(map(packed, MESSAGES))
    cutter, received = MessageCutter(), []
    start = 0
    for size in [*sizes, len(data)]:
        received += cutter.push(data[start : start + size])
        start += size
    _same(received)


def test_messages_through_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sending = threading.Thread(target=lambda: [send_message(ours, m) for m in MESSAGES])
        sending.start()
        _same([receive_message(theirs) for _ in MESSAGES])
        sending.join()
        ours.close()
        with pytest.raises(EOFError):
            receive_message(theirs)


def test_typed_errors_keep_what_they_say() -> None:
    [output] = MessageCutter().push(
        packed(
            StepOutput(
                endings={
                    "a": InvalidRequestError("too long", "max_tokens"),
                    "b": EngineDeadError("dead", "replica-1"),
                }
            )
        )
    )
    assert output.endings["a"].param == "max_tokens"
    assert output.endings["b"].replica_id == "replica-1"
