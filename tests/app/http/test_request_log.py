"""Ids of requests and what the log says of each: one line, whatever becomes of it."""

import asyncio
import json
import logging

import httpx
import openai
import pytest
from ray.serve._private.http_util import RequestIdMiddleware

from app.http.request_ids import MAX_LEN
from slora_core.errors import EngineDeadError, EngineFaultError, InvalidRequestError
from tests.app.api_errors import error_of
from tests.app.http.test_routes import Server, events_of, server, statuses_when_leaving, tokenizer

__all__ = ["server", "tokenizer"]

# Of a prompt or an answer: in no log.
MARKER = "xyzzy"
PATH = "/v1/completions"


def lines_of(caplog):
    """The fields of each line that tells of a request."""
    return [vars(r) for r in caplog.records if r.name == "app.http.request_log"]


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.DEBUG)
    return caplog


def send(server, method, path, headers=(), **fields):
    """A request as it comes from Serve, and its answer as it leaves Serve."""

    async def run():
        transport = httpx.ASGITransport(RequestIdMiddleware(server.make_app()))
        async with httpx.AsyncClient(transport=transport, base_url="http://slora") as client:
            return await client.request(method, path, headers=dict(headers), **fields)

    return asyncio.run(run())


@pytest.mark.parametrize("request_id", ["a", "x" * MAX_LEN, "~!{}\"'%s=\\/<>"])
@pytest.mark.parametrize(
    "method,path,body,status",
    [
        ("POST", PATH, {"model": "base", "prompt": "hi"}, 200),
        ("POST", PATH, {"model": "base", "prompt": "hi", "stream": True}, 200),
        ("POST", PATH, {"model": "nobody's", "prompt": "hi"}, 404),
        ("POST", PATH, {"model": "base"}, 400),
        ("GET", "/v1/models", None, 200),
        ("GET", "/nowhere", None, 404),
        ("GET", PATH, None, 405),
    ],
)
def test_a_clients_id_is_in_the_answer_once_and_in_the_log(
    server, log, method, path, body, status, request_id
):
    response = send(server, method, path, {"X-Request-Id": request_id}, json=body)
    assert response.status_code == status
    assert response.headers["x-request-id"] == request_id
    [line] = lines_of(log)
    assert (line["request_id"], line["http_status"]) == (request_id, status)
    for request in server.engine.requests:
        assert request.request_id.startswith(f"cmpl-{request_id}-")


@pytest.mark.parametrize(
    "request_id", ["", "two words", "x" * (MAX_LEN + 1), "tab\there", "caf\xe9"]
)
def test_an_id_that_cannot_be_used_is_refused(server, request_id):
    headers = {"X-Request-Id": request_id.encode("latin-1")}
    response = server.call(lambda client: client.post(PATH, headers=headers, json={}))
    error = error_of(response, 400)
    assert error["param"] == "X-Request-Id" and f"1 to {MAX_LEN}" in error["message"]


def test_one_id_of_several_requests_at_once(server, log):
    """Each is another one to engines, and so are the prompts of one."""

    async def work(client):
        body = {"model": "base", "prompt": ["a", "b"]}
        headers = {"X-Request-Id": "same"}
        answers = [client.post(PATH, json=body, headers=headers) for _ in range(5)]
        return [answer.json()["id"] for answer in await asyncio.gather(*answers)]

    answer_ids = server.call(work)
    assert len(set(answer_ids)) == 5
    assert len({request.request_id for request in server.engine.requests}) == 10
    assert {line["answer_id"] for line in lines_of(log)} == set(answer_ids)


def test_openai_client_reads_the_id(server, log):
    async def work():
        transport = httpx.ASGITransport(RequestIdMiddleware(server.make_app()))
        async with openai.AsyncOpenAI(
            api_key="none",
            base_url="http://slora/v1",
            max_retries=0,
            http_client=httpx.AsyncClient(transport=transport),
        ) as client:
            drawn = await client.completions.create(model="base", prompt="hi")
            given = await client.completions.create(
                model="base", prompt="hi", extra_headers={"X-Request-Id": "mine"}
            )
            with pytest.raises(openai.NotFoundError) as failed:
                await client.completions.create(model="nobody's", prompt="hi")
        return drawn, given, failed.value

    drawn, given, failed = asyncio.run(work())
    assert given._request_id == "mine"
    told = [drawn._request_id, "mine", failed.request_id]
    assert [line["request_id"] for line in lines_of(log)] == told and len(set(told)) == 3
    assert drawn.id.startswith(f"cmpl-{drawn._request_id}-")


@pytest.mark.parametrize("stream", [False, True])
def test_the_line_of_an_answer(server, log, stream):
    server.engine.num_cached_tokens, server.engine.num_moves = 1, 2
    server.engine.delay_s = 0.01
    response = server.complete(model="sql", stream=stream)
    answer = events_of(response)[0] if stream else response.json()
    [line] = lines_of(log)
    expected = {
        "http_method": "POST",
        "http_route": PATH,
        "http_status": 200,
        "answer_id": answer["id"],
        "model": "sql",
        "adapter_version": 1,
        "outcome": "length",
        "prompt_tokens": 2,
        "output_tokens": 11,
        "cached_tokens": 1,
        "moves": 2,
    }
    assert {key: line[key] for key in expected} == expected
    assert 0.01 <= line["first_token_s"] < line["total_s"]
    [text] = [r.getMessage() for r in log.records if r.name == "app.http.request_log"]
    assert f"answer_id={answer['id']} model=sql adapter_version=1 prompt_tokens=2" in text


def test_the_line_of_a_failure(server, log):
    server.engine.errors = {0: EngineDeadError("gone")}
    server.complete()
    server.engine.errors = {2: EngineDeadError("gone")}
    server.complete(stream=True)
    early, late = lines_of(log)
    assert (early["http_status"], early["outcome"]) == (503, "ServiceUnavailableError")
    assert (late["http_status"], late["outcome"]) == (200, "ServiceUnavailableError")
    assert (early["output_tokens"], late["output_tokens"]) == (0, 6)
    assert early["first_token_s"] is None and late["first_token_s"] is not None


@pytest.mark.parametrize("stream", [False, True])
def test_the_line_of_a_client_that_left(server, log, stream):
    server.engine.delay_s = 5.0
    body = json.dumps({"model": "base", "prompt": "hi", "stream": stream}).encode()
    statuses_when_leaving(server, body)
    [line] = lines_of(log)
    assert (line["http_status"], line["outcome"], line["output_tokens"]) == (499, "left", 0)


def test_what_only_reads_is_told_to_those_who_debug(server, log):
    server.get("/health")
    server.get("/v1/models")
    server.is_ready = False
    server.get("/health")
    assert [record.levelname for record in log.records if record.name.startswith("app")] == [
        "DEBUG",
        "DEBUG",
        "INFO",
    ]


# Requests with a text in each place that takes one.
REQUESTS = [
    (PATH, {"prompt": MARKER}),
    (PATH, {"prompt": [MARKER, MARKER], "stream": True}),
    (PATH, {"prompt": MARKER, "stop": MARKER[:3]}),
    (PATH, {"prompt": MARKER * 100}),
    (PATH, {"prompt": {MARKER: MARKER}}),
    (PATH, {"prompt": MARKER, MARKER: 1}),
    (PATH, {"prompt": MARKER, "temperature": MARKER}),
    (PATH, {"prompt": MARKER, "model": MARKER}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": MARKER}]}),
    ("/v1/chat/completions", {"messages": [{"role": MARKER, "content": MARKER}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": MARKER}], "stream": True}),
    ("/v1/chat/completions", {"messages": MARKER}),
    (f"/v1/{MARKER}", {}),
]
FAILURES = [
    {},
    {1: EngineFaultError("the engine failed")},
    {1: InvalidRequestError(MARKER)},
    {0: ValueError(MARKER)},
    {1: RuntimeError(f"cannot decode {MARKER}")},
]


@pytest.mark.parametrize("errors", FAILURES, ids=str)
def test_no_text_of_a_request_or_an_answer_is_in_any_log(server, log, errors):
    server.engine.text, server.engine.errors = MARKER * 3, errors
    for path, fields in REQUESTS:
        server.post(path, {"model": "base", **fields})
    for stream in (False, True):
        body = {"model": "base", "prompt": MARKER, "stream": stream}
        server.engine.delay_s = 0.2
        statuses_when_leaving(server, json.dumps(body).encode())
        server.engine.delay_s = 0.0
    statuses_when_leaving(server, b'{"prompt": "' + MARKER.encode(), is_whole=False)
    assert len(lines_of(log)) == len(REQUESTS) + 3
    # The client's own.
    for record in [record for record in log.records if record.name != "httpx"]:
        assert MARKER not in logging.Formatter().format(record) + str(vars(record))


def test_a_defect_is_logged_with_where_it_was(server, log):
    server.engine.errors = {0: ValueError(MARKER)}
    error = error_of(server.complete(), 500)
    [record] = [record for record in log.records if record.levelname == "ERROR"]
    request_id = lines_of(log)[0]["request_id"]
    assert request_id in error["message"] and request_id in record.getMessage()
    assert "fakes.py" in record.getMessage() and "ValueError" in record.getMessage()


def test_servers_do_not_share_ids(tokenizer):
    """Where nobody gives one, each is drawn."""
    ids = {Server(tokenizer).complete().json()["id"] for _ in range(3)}
    assert len(ids) == 3
