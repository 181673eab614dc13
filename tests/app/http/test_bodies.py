"""Bodies that are too large, too slow or too many, and that they cost nobody else anything."""

import asyncio

import pytest
from starlette.requests import ClientDisconnect, Request

from app.http.bodies import FREE_BYTES, BodyReader
from app.http.errors import BodyTimeoutError, BodyTooLargeError
from slora_core.errors import OverloadedError
from tests.virtual_time import run_in_virtual_time

MIB = 2**20


def request_of(*parts, every_s=0.0, ends=True):
    """A request whose body comes in parts, one every so often."""
    waiting = list(parts)

    async def receive():
        if not waiting and not ends:
            return {"type": "http.disconnect"}
        await asyncio.sleep(every_s)
        body = waiting.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(waiting) or not ends}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


async def read(reader, request):
    async with reader.reading(request) as body:
        return body


def test_a_body_in_parts():
    reader = BodyReader(MIB, 5.0, MIB)
    assert run_in_virtual_time(read(reader, request_of(b"ab", b"", b"c"))) == b"abc"


def test_one_byte_too_many():
    reader = BodyReader(10, 5.0, MIB)
    assert run_in_virtual_time(read(reader, request_of(b"x" * 10))) == b"x" * 10
    with pytest.raises(BodyTooLargeError, match="more than 10 bytes"):
        run_in_virtual_time(read(reader, request_of(b"x" * 6, b"x" * 5)))


def test_a_client_that_trickles_is_given_up_and_others_are_served():
    async def main():
        reader = BodyReader(MIB, 5.0, MIB)
        loop = asyncio.get_running_loop()
        slow = asyncio.create_task(read(reader, request_of(*[b"x"] * 1000, every_s=1.0)))
        await asyncio.sleep(2)
        assert await read(reader, request_of(b"quick")) == b"quick"
        with pytest.raises(BodyTimeoutError, match=r"within 5 s; \d bytes of it did"):
            await slow
        assert loop.time() == pytest.approx(5)

    run_in_virtual_time(main())


def test_a_client_that_leaves():
    with pytest.raises(ClientDisconnect):
        run_in_virtual_time(
            read(BodyReader(MIB, 5.0, MIB), request_of(b"x" * FREE_BYTES * 2, ends=False))
        )


def test_what_is_in_flight_is_bounded_and_small_bodies_always_pass():
    async def main():
        reader = BodyReader(MIB, 60.0, 2 * MIB)
        parts = [b"x" * 900_000, b"x" * 100_000]
        large = [request_of(*parts, every_s=10.0) for _ in range(3)]
        readings = [asyncio.create_task(read(reader, request)) for request in large]
        await asyncio.sleep(15)
        assert len(await read(reader, request_of(b"x" * FREE_BYTES))) == FREE_BYTES
        results = await asyncio.gather(*readings, return_exceptions=True)
        [refused] = [result for result in results if not isinstance(result, bytes)]
        assert isinstance(refused, OverloadedError)
        assert "bodies of more than 2097152 bytes are being read" in str(refused)
        # All of it is given back, by those that failed too.
        assert len(await read(reader, request_of(b"x" * MIB))) == MIB
        assert reader._num_inflight_bytes == 0

    run_in_virtual_time(main())


def test_a_body_counts_until_it_was_parsed():
    async def main():
        reader = BodyReader(MIB, 60.0, MIB)
        async with reader.reading(request_of(b"x" * MIB)):
            with pytest.raises(OverloadedError):
                await read(reader, request_of(b"x" * MIB))
        assert len(await read(reader, request_of(b"x" * MIB))) == MIB

    run_in_virtual_time(main())
