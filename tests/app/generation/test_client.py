import asyncio

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorUnavailableError
from ray.serve.exceptions import BackPressureError

from app.generation.client import EngineClient
from app.generation.replica_protocol import GenerateRequest, TokenChunk
from slora_core.errors import EngineDeadError, InvalidRequestError, OverloadedError
from slora_core.requests import SamplingParams
from tests.app.fakes import make_record


class FakeHandle:
    """Plays one script a call: chunks to yield, exceptions to raise."""

    def __init__(self, *scripts):
        self.scripts = list(scripts)
        self.requests = []
        self.options_seen = []
        self.num_cancelled = 0

    def options(self, **options):
        self.options_seen.append(options)
        return self

    @property
    def generate(self):
        return self

    def remote(self, request):
        self.requests.append(request)
        return FakeResponses(self, self.scripts.pop(0))


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


REQUEST = GenerateRequest("r", [1], SamplingParams(), make_record("a"))
LAST = TokenChunk([2], "length")
DEAD = TokenChunk(error=EngineDeadError("dead"), replica_id="replica-1")
UNAVAILABLE = ActorUnavailableError("gone", b"x" * 16)


def grpc_error(status):
    return AioRpcError(status, Metadata(), Metadata(), details="told by gRPC")


CANCELLED = grpc_error(StatusCode.CANCELLED)


def generate(handle, num=None):
    async def run():
        chunks = EngineClient(handle).generate(REQUEST)
        seen = []
        async for chunk in chunks:
            seen.append(chunk)
            if len(seen) == num:
                break
        await chunks.aclose()
        return seen

    return asyncio.run(run())


def test_chunks_come_through_and_the_adapter_is_the_session():
    handle = FakeHandle([TokenChunk([1]), LAST])
    assert generate(handle) == [TokenChunk([1]), LAST]
    assert handle.options_seen == [{"stream": True, "session_id": "a-v1", "_by_reference": False}]
    assert handle.num_cancelled == 0


def test_leaving_early_cancels():
    handle = FakeHandle([TokenChunk([1]), LAST])
    generate(handle, num=1)
    assert handle.num_cancelled == 1


@pytest.mark.parametrize("failure", [DEAD, UNAVAILABLE, CANCELLED, None])
def test_a_request_without_token_is_sent_once_more(failure):
    handle = FakeHandle([failure] if failure else [], [LAST])
    assert generate(handle) == [LAST]
    expected = "replica-1" if failure is DEAD else None
    assert handle.requests[1].avoid_replica == expected
    first, second = (request.request_id for request in handle.requests)
    assert first != second and first.startswith("r.") and second.startswith("r.")


def test_attempts_of_one_request_never_share_an_id():
    handle = FakeHandle([LAST], [LAST])

    async def run():
        client = EngineClient(handle)
        for _ in range(2):
            assert [chunk async for chunk in client.generate(REQUEST)] == [LAST]

    asyncio.run(run())
    assert len({request.request_id for request in handle.requests}) == 2


@pytest.mark.parametrize("status", [StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNKNOWN])
def test_a_call_that_fails_for_itself_is_no_dead_replica(status):
    handle = FakeHandle([grpc_error(status)], [LAST])
    with pytest.raises(AioRpcError):
        generate(handle)
    assert len(handle.requests) == 1


@pytest.mark.parametrize("failure", [DEAD, UNAVAILABLE])
def test_two_failures_are_an_error(failure):
    with pytest.raises(EngineDeadError):
        generate(FakeHandle([failure], [failure], [LAST]))


@pytest.mark.parametrize("failure", [DEAD, UNAVAILABLE])
def test_a_stream_that_has_begun_is_not_sent_again(failure):
    handle = FakeHandle([TokenChunk([1]), failure], [LAST])
    with pytest.raises(EngineDeadError):
        generate(handle)
    assert len(handle.requests) == 1


def test_errors_that_are_data_are_raised():
    with pytest.raises(InvalidRequestError, match="too long"):
        generate(FakeHandle([TokenChunk(error=InvalidRequestError("too long"))]))


def test_overload():
    with pytest.raises(OverloadedError):
        generate(FakeHandle([BackPressureError(5, 4)]))
