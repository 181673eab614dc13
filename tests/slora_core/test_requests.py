"""What goes between processes for each request and each step: what it says, and how small it is."""

import pickle
import sys
import time
import uuid

import pytest

from slora_core.errors import InvalidRequestError, OverloadedError
from slora_core.requests import (
    Delta,
    FinishReason,
    Request,
    RequestState,
    SamplingParams,
    StepOutput,
)


def test_requests_have_names_of_their_own() -> None:
    requests = [Request([5], SamplingParams()) for _ in range(100)]
    assert len({request.request_id for request in requests}) == 100


def test_a_request_is_not_changed_by_its_progress() -> None:
    request = Request([5, 6], SamplingParams(max_tokens=4), "a", [7], request_id="r")
    state = RequestState(request)
    assert (state.request_id, state.prompt_ids, state.adapter_id) == ("r", [5, 6], "a")
    assert (state.output_ids, state.num_tokens, state.max_total_tokens) == ([7], 3, 6)
    state.output_ids.append(8)
    assert request.output_ids == [7] and state.token_ids(1, 4) == [6, 7, 8]
    # Another attempt begins where the request does.
    assert RequestState(request).output_ids == [7]


def test_a_request_goes_to_another_process_whole() -> None:
    request = Request(
        [5, 6],
        SamplingParams(max_tokens=4, stop=("x",)),
        "a",
        [7],
        request_id="r",
        tenant="t",
        arrived_at=1.5,
        deadline=9.0,
        priority=3,
    )
    assert pickle.loads(pickle.dumps(request)) == request


def test_nothing_is_nothing() -> None:
    assert not StepOutput() and StepOutput().deltas() == []
    assert StepOutput(endings={"r": FinishReason.ABORT})
    output = StepOutput()
    output.add("r", 5)
    assert output and output.endings == {}


def test_deltas_of_a_step() -> None:
    error = OverloadedError("too late")
    output = StepOutput()
    output.add("b", 5)
    output.add("a", 6, FinishReason.STOP)
    output.endings["refused"] = error
    assert output.deltas() == [
        Delta("b", [5]),
        Delta("a", [6], FinishReason.STOP),
        Delta("refused", [], None, error),
    ]
    assert [delta.is_last for delta in output.deltas()] == [False, True, True]


def test_several_steps_in_one() -> None:
    """Tokens stay in order, each request where it got its first, and an end stays an end."""
    output = StepOutput()
    for step in range(3):
        later = StepOutput()
        later.add("a", step)
        later.add("b", 10 + step, FinishReason.LENGTH if step == 2 else None)
        output.extend(later)
    output.extend(StepOutput(endings={"c": FinishReason.ABORT}))
    assert output.deltas() == [
        Delta("a", [0, 1, 2]),
        Delta("b", [10, 11, 12], FinishReason.LENGTH),
        Delta("c", [], FinishReason.ABORT),
    ]


def test_what_was_cached_of_prompts_is_told_with_their_tokens() -> None:
    output = StepOutput()
    output.add("a", 5)
    later = StepOutput(["b"], [6], {"b": FinishReason.STOP}, {"b": 16})
    output.extend(later)
    assert output.deltas() == [
        Delta("a", [5]),
        Delta("b", [6], FinishReason.STOP, num_cached_tokens=16),
    ]
    assert Delta.of("r", [1], None, 16) == Delta("r", [1], num_cached_tokens=16)


@pytest.mark.parametrize("min_tokens", [-1, 6])
def test_min_tokens_out_of_range(min_tokens: int) -> None:
    with pytest.raises(InvalidRequestError, match="0 to max_tokens, which is 5") as caught:
        SamplingParams(max_tokens=5, min_tokens=min_tokens)
    assert caught.value.param == "min_tokens"


def test_an_error_beside_tokens() -> None:
    error = InvalidRequestError("no", "prompt")
    assert Delta.of("r", [1], error) == Delta("r", [1], None, error)
    assert Delta.of("r", [1], FinishReason.STOP) == Delta("r", [1], FinishReason.STOP, None)
    assert Delta.of("r", [1], None) == Delta("r", [1])


@pytest.mark.parametrize("num_endings", [0, 8])
def test_a_step_of_256_rows_is_a_small_message(num_endings: int) -> None:
    output = StepOutput()
    for index in range(256):
        ending = FinishReason.LENGTH if index < num_endings else None
        output.add(uuid.uuid4().hex, 1000 * index, ending)
    sent = pickle.dumps(output, protocol=pickle.HIGHEST_PROTOCOL)
    # An id of 32 letters and a token are 40 bytes.
    assert len(sent) < 256 * 44 + 512
    assert pickle.loads(sent) == output

    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        pickle.loads(pickle.dumps(output, protocol=pickle.HIGHEST_PROTOCOL))
        seconds.append(time.perf_counter() - started)
    sys.stdout.write(f"{len(sent)} bytes, {1e6 * min(seconds):.0f} us to pickle and unpickle\n")


def test_errors_keep_what_they_say_and_name() -> None:
    output = StepOutput(endings={"r": InvalidRequestError("too long", "max_tokens")})
    error = pickle.loads(pickle.dumps(output)).endings["r"]
    assert isinstance(error, InvalidRequestError)
    assert (str(error), error.param) == ("too long", "max_tokens")
