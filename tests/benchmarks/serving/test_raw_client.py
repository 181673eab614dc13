"""The cheap client keeps what comes, however it is cut, and reads only whole answers."""

import asyncio
import json

import pytest

from benchmarks.serving.raw_client import BadAnswerError, RawConnection, post, read_stream

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
# Between two parts of an answer.
PAUSE_S = 0.01
REFUSAL = b'HTTP/1.1 503 Service Unavailable\r\nContent-Length: 15\r\n\r\n{"error": "no"}'


def chunk(data):
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(delta, reason=None):
    data = {"choices": [{"delta": delta, "finish_reason": reason}]}
    return chunk(b"data: " + json.dumps(data).encode() + b"\n\n")


DONE = chunk(b"data: [DONE]\n\n")


def answer(*events):
    return HEAD + b"".join(events) + chunk(b"")


WHOLE = answer(
    chunk(b": the request waits\n\n"),
    event({"role": "assistant", "content": "Über"}),
    event({"content": " 0\r\n\r\n"}),
    event({}, "length"),
    DONE,
)


def test_a_whole_stream():
    streamed = read_stream(WHOLE)
    assert (streamed.text, streamed.finish_reason) == ("Über 0\r\n\r\n", "length")
    assert streamed.num_pieces == 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (REFUSAL, "503"),
        (answer(event({"content": "a"})), "ends with"),
        (answer(chunk(b'data: {"error": {"code": 500}}\n\n'), DONE), "no event of a chat"),
        (answer(chunk(b"data: {oops\n\n"), DONE), "no event of a chat"),
    ],
)
def test_what_is_no_answer(data, reason):
    with pytest.raises(BadAnswerError, match=reason):
        read_stream(data)


def serve(parts, use):
    """What `use` makes of a server that sends these parts for every request."""
    heads = []

    async def handle(reader, writer):
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return
            heads.append(head)
            length = int(head.lower().split(b"content-length:")[1].split()[0])
            assert json.loads(await reader.readexactly(length)) == {"a": 1}
            for part in parts:
                if part is None:
                    writer.close()
                    return
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(PAUSE_S)

    async def main():
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        connection = await RawConnection.open(url)
        try:
            return await use(connection, post(url, "/path", {"a": 1}))
        finally:
            connection.close()
            server.close()

    result = asyncio.run(main())
    assert all(head.startswith(b"POST /path HTTP/1.1\r\n") for head in heads)
    return result


# Within the head, before the first event, within one, within the end.
@pytest.mark.parametrize("cut", [10, len(HEAD) + 20, len(HEAD) + 60, len(WHOLE) - 3])
def test_answers_that_come_in_parts(cut):
    async def use(connection, request):
        return [await connection.ask(request) for _ in range(2)]

    answers = serve([WHOLE[:cut], WHOLE[cut:]], use)
    assert [each.data for each in answers] == [WHOLE, WHOLE]
    for each in answers:
        assert each.sent_at < each.first_at <= each.ended_at
        if b"data:" not in WHOLE[:cut]:
            assert each.first_at - each.sent_at >= PAUSE_S


def test_an_error_has_an_end_too():
    async def use(connection, request):
        return await connection.ask(request)

    refused = serve([REFUSAL[:60], REFUSAL[60:]], use)
    assert refused.data == REFUSAL and refused.first_at is None


def test_a_connection_that_is_cut():
    async def use(connection, request):
        with pytest.raises(ConnectionError, match="HTTP/1.1 200"):
            await connection.ask(request)

    serve([WHOLE[:60], None], use)
