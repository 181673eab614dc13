import asyncio
import time
from dataclasses import replace

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorUnavailableError

from app.generation.backlog import Backlog
from app.generation.client import WAITING, EngineClient
from app.generation.text_ends import GATHER_S, TextEndedError
from slora_core.errors import (
    AdapterNotFoundError,
    AdapterUnavailableError,
    EngineDeadError,
    InvalidAdapterError,
    InvalidRequestError,
    OverloadedError,
    RequestTimeoutError,
    ServerStoppingError,
    StoreFullError,
)
from slora_core.requests import Delta, FinishReason, Request, SamplingParams
from tests.app.fakes import make_record
from tests.virtual_time import run_in_virtual_time


class FakeHandle:
    """Plays one script a call: deltas to yield, exceptions to raise."""

    def __init__(self, *scripts):
        self.scripts = list(scripts)
        self.requests = []
        self.avoided = []
        self.options_seen = []
        self.num_cancelled = 0
        self.broadcasts = []
        self.responses = FakeResponses

    def options(self, **options):
        self.options_seen.append(options)
        return self

    @property
    def generate(self):
        return self

    def broadcast(self, method, *args):
        self.broadcasts.append((method, *args))
        return self

    async def results_async(self, return_exceptions):
        assert return_exceptions

    def remote(self, request, record, avoid_replica):
        assert request.adapter_id == record.adapter_id
        self.requests.append(request)
        self.avoided.append(avoid_replica)
        return self.responses(self, self.scripts.pop(0))


class FakeResponses:
    def __init__(self, handle, script):
        self.handle = handle
        self.script = iter(script)

    def __aiter__(self):
        return self

    async def __anext__(self):
        item = next(self.script, None)
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self):
        self.handle.num_cancelled += 1


TIMEOUT_S = 60.0
REQUEST = Request([1], SamplingParams(), "a-v1", request_id="r")
FIRST = Delta("r", [1])
ARRIVED = Delta("r", [])
LAST = Delta("r", [2], FinishReason.LENGTH)
DEAD = Delta("r", [], error=EngineDeadError("dead", "replica-1"))
UNAVAILABLE = ActorUnavailableError("gone", b"x" * 16)


def grpc_error(status):
    return AioRpcError(status, Metadata(), Metadata(), details="told by gRPC")


CANCELLED = grpc_error(StatusCode.CANCELLED)


RECORD = make_record("a")


async def no_newer(record, error):
    raise AssertionError("nobody should ask for a newer adapter")


def make_client(handle, max_requests=1000):
    return EngineClient(handle, Backlog(max_requests, max_tokens=1000), TIMEOUT_S, "model@a")


def generate(handle, num=None, renew=no_newer):
    async def run():
        deltas = make_client(handle).generate(REQUEST, RECORD, renew)
        seen = []
        async for delta in deltas:
            seen.append(delta)
            if len(seen) == num:
                break
        await deltas.aclose()
        return seen

    return run_in_virtual_time(run())


def test_deltas_come_through_and_the_adapter_is_the_session():
    handle = FakeHandle([FIRST, LAST])
    assert generate(handle) == [FIRST, LAST]
    assert [request.model_key for request in handle.requests] == ["model@a"]
    assert handle.options_seen == [{"stream": True, "session_id": "a-v1", "_by_reference": False}]
    assert handle.num_cancelled == 0


def test_leaving_early_cancels():
    handle = FakeHandle([FIRST, LAST])
    generate(handle, num=1)
    assert handle.num_cancelled == 1


class EndlessResponses:
    """Waits for ever for the second delta, until it is cancelled as Serve's responses are."""

    def __init__(self):
        self.items = asyncio.Queue()
        self.items.put_nowait(FIRST)

    def __aiter__(self):
        return self

    async def __anext__(self):
        item = await self.items.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self):
        self.items.put_nowait(self.cancellation)


@pytest.mark.parametrize("cancellation", [asyncio.CancelledError(), CANCELLED])
def test_a_stop_ends_what_runs_and_refuses_what_comes(cancellation):
    responses = EndlessResponses()
    responses.cancellation = cancellation
    handle = FakeHandle([FIRST, LAST])

    async def run():
        client = make_client(handle)
        client._send = lambda *_: responses
        deltas = client.generate(REQUEST, RECORD, no_newer)
        assert await anext(deltas) == FIRST
        waiting = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)
        client.stop()
        with pytest.raises(ServerStoppingError):
            await waiting
        with pytest.raises(ServerStoppingError):
            await anext(client.generate(REQUEST, RECORD, no_newer))
        del client._send
        client.go_on()
        assert [delta async for delta in client.generate(REQUEST, RECORD, no_newer)] == [
            FIRST,
            LAST,
        ]

    asyncio.run(run())


def test_the_ends_of_texts_are_told_together():
    handle = FakeHandle(*[[FIRST, LAST]] * 4)

    async def run():
        client = make_client(handle)
        for index in range(4):
            deltas = client.generate(REQUEST, RECORD, no_newer)
            assert await anext(deltas) == FIRST
            if index == 1:
                # Somebody left.
                await deltas.aclose()
                continue
            with pytest.raises(StopAsyncIteration):
                await deltas.athrow(TextEndedError())
            if index == 2:
                await asyncio.sleep(2 * GATHER_S)
        await asyncio.sleep(2 * GATHER_S)

    run_in_virtual_time(run())
    assert handle.num_cancelled == 4
    ids = [request.request_id for request in handle.requests]
    assert handle.broadcasts == [("ended_by_text", [ids[0], ids[2]]), ("ended_by_text", [ids[3]])]


@pytest.mark.parametrize("failure", [DEAD, UNAVAILABLE, CANCELLED, None])
def test_a_request_without_token_is_sent_once_more(failure):
    handle = FakeHandle([failure] if failure else [], [LAST])
    assert generate(handle) == [LAST]
    expected = "replica-1" if failure is DEAD else None
    assert handle.avoided == [None, expected]
    first, second = (request.request_id for request in handle.requests)
    assert first != second and first.startswith("r.") and second.startswith("r.")


def test_attempts_of_one_request_never_share_an_id():
    handle = FakeHandle([LAST], [LAST])

    async def run():
        client = make_client(handle)
        for _ in range(2):
            assert [d async for d in client.generate(REQUEST, RECORD, no_newer)] == [LAST]

    asyncio.run(run())
    assert len({request.request_id for request in handle.requests}) == 2


@pytest.mark.parametrize("status", [StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNKNOWN])
def test_a_call_that_fails_for_itself_is_no_dead_replica(status):
    handle = FakeHandle([grpc_error(status)], [LAST])
    with pytest.raises(AioRpcError):
        generate(handle)
    assert len(handle.requests) == 1


@pytest.mark.parametrize("failure", [DEAD, UNAVAILABLE, CANCELLED, None])
def test_a_stream_goes_on_after_the_tokens_that_came(failure):
    second = Delta("r", [5, 6])
    broken = [FIRST, Delta("r", [3, 4])] + ([failure] if failure else [])
    handle = FakeHandle(broken, [ARRIVED, second, LAST])
    assert generate(handle) == [*broken[:2], ARRIVED, second, LAST]
    first, again = handle.requests
    assert (first.output_ids, first.num_moves, first.is_suspect) == ([], 0, False)
    assert (again.output_ids, again.num_moves, again.is_suspect) == ([1, 3, 4], 1, False)
    assert (again.prompt_ids, again.sampling) == (first.prompt_ids, first.sampling)


class SlowResponses(FakeResponses):
    """As scripted; a number is so many seconds in which nothing comes. Cancelled as Serve's are."""

    def __init__(self, handle, script):
        super().__init__(handle, script)
        self.is_cancelled = asyncio.Event()

    async def __anext__(self):
        item = await super().__anext__()
        while isinstance(item, float):
            try:
                await asyncio.wait_for(self.is_cancelled.wait(), item)
            except TimeoutError:
                item = await super().__anext__()
            else:
                raise asyncio.CancelledError
        return item

    def cancel(self):
        super().cancel()
        self.is_cancelled.set()


def slow(*scripts):
    handle = FakeHandle(*scripts)
    handle.responses = SlowResponses
    return handle


def test_a_client_hears_of_a_request_that_waits_for_an_engine():
    handle = slow([FIRST, DEAD], [12.0, ARRIVED, 7.0, LAST])
    assert generate(handle) == [FIRST, WAITING, WAITING, ARRIVED, WAITING, LAST]


def test_no_engine_in_time_is_an_error():
    handle = slow([FIRST, DEAD], [TIMEOUT_S + 1, LAST])
    with pytest.raises(EngineDeadError, match="no other one took it over in time"):
        generate(handle)
    assert handle.num_cancelled == 1
    # Nor where each that takes it refuses it at once.
    handle = FakeHandle([FIRST], *[[DEAD]] * 1000)
    with pytest.raises(EngineDeadError, match="dead"):
        generate(handle)
    assert TIMEOUT_S <= len(handle.requests) <= TIMEOUT_S + 10


def test_what_was_accepted_waits_for_room():
    full = [Delta("r", [], error=StoreFullError("full"))]
    handle = FakeHandle([FIRST, DEAD], full, full, [LAST])
    assert generate(handle) == [FIRST, LAST]
    assert [request.num_moves for request in handle.requests] == [0, 1, 2, 3]
    with pytest.raises(StoreFullError):
        generate(FakeHandle(full))


def test_errors_that_are_data_are_raised():
    with pytest.raises(InvalidRequestError, match="too long"):
        generate(FakeHandle([Delta("r", [], error=InvalidRequestError("too long"))]))


def test_what_waits_for_its_first_token_is_bounded():
    handle = slow([10.0, FIRST, 10.0, LAST], [FIRST, LAST])

    async def run():
        client = make_client(handle, max_requests=1)
        first = client.generate(REQUEST, RECORD, no_newer)
        waiting = asyncio.ensure_future(anext(first))
        await asyncio.sleep(1)
        with pytest.raises(OverloadedError, match="1 requests wait"):
            await anext(client.generate(REQUEST, RECORD, no_newer))
        assert await waiting == FIRST
        # It has begun and counts no more, and the one that was refused left nothing.
        assert [d async for d in client.generate(REQUEST, RECORD, no_newer)] == [FIRST, LAST]
        assert [d async for d in first] == [LAST]
        # Nor does one that is left before.
        handle.scripts = [[10.0, FIRST], [FIRST, LAST]]
        leaving = asyncio.ensure_future(anext(client.generate(REQUEST, RECORD, no_newer)))
        await asyncio.sleep(1)
        leaving.cancel()
        await asyncio.wait({leaving})
        assert [d async for d in client.generate(REQUEST, RECORD, no_newer)] == [FIRST, LAST]

    run_in_virtual_time(run())


@pytest.mark.parametrize(
    ("scripts", "expected"),
    [
        # It waits for its first token, in the middle of its answer, for another engine.
        ([[100.0, FIRST]], []),
        ([[FIRST, 100.0, LAST]], [FIRST]),
        ([[FIRST, DEAD], *[[DEAD]] * 1000], [FIRST]),
        ([[FIRST, DEAD], [100.0, LAST]], [FIRST, WAITING]),
    ],
)
def test_a_deadline_ends_a_request_wherever_it_is(scripts, expected):
    handle = slow(*scripts)
    seen = []

    async def run():
        loop = asyncio.get_running_loop()
        request = replace(REQUEST, deadline=time.time() + 7.0)
        with pytest.raises(RequestTimeoutError, match="timeout has passed"):
            async for delta in make_client(handle).generate(request, RECORD, no_newer):
                seen.append(delta)
        assert 6.9 < loop.time() < 8.1

    run_in_virtual_time(run())
    assert seen == expected


def test_tokens_that_came_before_an_error_are_handed_over():
    tokens, error = Delta("r", [3, 4]), Delta("r", [], error=InvalidRequestError("wrong"))
    handle = FakeHandle([FIRST, tokens, error])
    seen = []

    async def run():
        async for delta in make_client(handle).generate(REQUEST, RECORD, no_newer):
            seen.append(delta)

    with pytest.raises(InvalidRequestError):
        asyncio.run(run())
    assert seen == [FIRST, tokens]


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (AdapterNotFoundError("gone"), InvalidRequestError),
        (InvalidAdapterError("changed"), InvalidRequestError),
        # For as long as its files are away.
        (AdapterUnavailableError("nothing has it"), AdapterUnavailableError),
    ],
)
def test_a_request_whose_adapter_was_replaced_goes_to_the_new_version(error, again):
    async def renew(record, cause):
        assert (record, cause) == (RECORD, error)
        return make_record("a", version=2)

    handle = FakeHandle([Delta("r", [], error=error)], [LAST])
    assert generate(handle, renew=renew) == [LAST]
    assert [request.adapter_id for request in handle.requests] == ["a-v1", "a-v2"]
    sessions = [options["session_id"] for options in handle.options_seen]
    assert sessions == ["a-v1", "a-v2"]
    # Once: what is gone again is the caller's to see.
    handle = FakeHandle([Delta("r", [], error=error)], [Delta("r", [], error=error)])
    with pytest.raises(again, match=str(error)) as caught:
        generate(handle, renew=renew)
    assert getattr(caught.value, "param", "model") == "model"


def test_an_adapter_that_is_gone_in_the_middle_is_an_error():
    handle = FakeHandle([FIRST, Delta("r", [], error=AdapterNotFoundError("gone"))])
    with pytest.raises(AdapterNotFoundError):
        generate(handle)
