import asyncio
import json
import threading
import time
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace

import httpx
import openai
import pytest
from ray.exceptions import ActorUnavailableError, TaskCancelledError

from app.generation.backlog import DEFAULT_RETRY_AFTER_S, Backlog
from app.http.bodies import BodyReader
from app.http.limits import ModelLimits
from app.http.parsing import parse_body
from app.http.routes import Ingress, api_app
from app.http.service import CompletionService
from app.registry.follower import RegistryView
from slora_core.errors import (
    AdapterUnavailableError,
    EngineDeadError,
    InvalidAdapterError,
    InvalidRequestError,
)
from slora_core.models.generation_defaults import OPENAI_DEFAULTS, GenerationDefaults
from slora_core.text.adapter_text import AdapterText
from slora_core.text.tokenizer import Tokenizer
from tests.app.api_errors import error_of
from tests.app.fakes import FakeEngine, FakeRegistry, make_record
from tests.tiny_tokenizer import VOCAB_SIZE, byte_ids, make_tokenizer
from tests.virtual_time import run_in_virtual_time

LIMITS = ModelLimits(
    context_len=100,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=frozenset({2}),
    page_tokens=16,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


class Server:
    """The ASGI application over fakes; `call` runs one coroutine with a client of it."""

    def __init__(self, tokenizer):
        self.engine = FakeEngine()
        self.registry = FakeRegistry("sql", "json")
        self.is_ready = True
        self.max_body_bytes = 10_000
        self.defaults = OPENAI_DEFAULTS
        self.tokenizer = tokenizer
        self.backlog = Backlog(max_requests=1, max_tokens=100)

    def make_app(self):
        view = RegistryView(self.registry)
        service = CompletionService(
            "base", "/base", LIMITS, self.tokenizer, view, self.engine, self.defaults
        )

        async def is_ready():
            return self.is_ready

        bodies = BodyReader(self.max_body_bytes, 5.0, 2**24)
        ingress = Ingress(service, self.registry, is_ready, bodies, self.backlog.check_room)
        return api_app(ingress, lambda app: nullcontext())

    def call(self, work):
        async def run():
            transport = httpx.ASGITransport(self.make_app())
            async with httpx.AsyncClient(transport=transport, base_url="http://slora") as client:
                return await work(client)

        return asyncio.run(run())

    def post(self, path, body):
        return self.call(lambda client: client.post(path, json=body))

    def get(self, path):
        return self.call(lambda client: client.get(path))

    def complete(self, **fields):
        return self.post("/v1/completions", {"model": "base", "prompt": "hi", **fields})

    def chat(self, **fields):
        messages = [{"role": "user", "content": "hi"}]
        return self.post("/v1/chat/completions", {"model": "base", "messages": messages, **fields})

    def openai(self, work):
        async def run():
            transport = httpx.ASGITransport(self.make_app())
            async with openai.AsyncOpenAI(
                api_key="none",
                base_url="http://slora/v1",
                max_retries=0,
                http_client=httpx.AsyncClient(transport=transport),
            ) as client:
                return await work(client)

        return asyncio.run(run())


@pytest.fixture
def server(tokenizer):
    return Server(tokenizer)


def events_of(response):
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def usage_of(num_prompt, num_output, num_cached=0):
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def test_completion(server):
    answer = server.complete().json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "hello world", "logprobs": None, "finish_reason": "length"}
    ]
    assert answer["usage"] == usage_of(2, 11)
    [request] = server.engine.requests
    assert (request.prompt_ids, request.adapter_id) == (byte_ids(b"hi"), None)
    assert request.sampling.max_tokens == 16


def test_chat(server):
    answer = server.chat(model="sql").json()
    assert answer["object"] == "chat.completion"
    [choice] = answer["choices"]
    assert choice["message"]["content"] == "hello world"
    assert choice["message"]["role"] == "assistant"
    [request] = server.engine.requests
    assert request.adapter_id == "sql-v1"
    # All that the context and the pool beside the adapter's two pages leave.
    assert request.sampling.max_tokens == (6 - 2) * 16 - len(request.prompt_ids)


@pytest.mark.parametrize("chat", [False, True])
def test_stream(server, chat):
    response = server.chat(stream=True) if chat else server.complete(stream=True)
    events = events_of(response)
    assert len(events) == 4
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)
    choices = [event["choices"][0] for event in events]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]
    if chat:
        assert choices[0]["delta"] == {"role": "assistant", "content": "hel"}
        assert "".join(choice["delta"]["content"] for choice in choices) == "hello world"
    else:
        assert "".join(choice["text"] for choice in choices) == "hello world"


def test_stream_with_usage(server):
    events = events_of(server.complete(stream=True, stream_options={"include_usage": True}))
    assert [event["usage"] for event in events[:-1]] == [None] * 4
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 11


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("include_usage", [False, True])
def test_stream_with_usage_in_every_event(server, chat, include_usage):
    server.engine.num_cached_tokens = 1
    options = {"continuous_usage_stats": True, "include_usage": include_usage}
    send = server.chat if chat else server.complete
    events = events_of(send(stream=True, stream_options=options))
    num_prompt = len(server.engine.requests[0].prompt_ids)
    expected = [usage_of(num_prompt, count, 1) for count in (3, 6, 9, 11)]
    if include_usage:
        expected.append(expected[-1])
        assert events[-1]["choices"] == []
    assert [event["usage"] for event in events] == expected
    plain = events_of(send(stream=True))
    assert [e["choices"] for e in events[:4]] == [e["choices"] for e in plain]


@pytest.mark.parametrize("stream", [False, True])
def test_usage_has_what_of_the_prompts_was_cached(server, stream):
    server.engine.num_cached_tokens = 16
    fields = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = server.complete(prompt=["x" * 20, "y" * 30], **fields)
    answer = events_of(response)[-1] if stream else response.json()
    assert answer["usage"] == usage_of(50, 22, 32)


def test_several_prompts(server):
    for stream in (False, True):
        response = server.complete(prompt=["a", "bc", [5]], stream=stream)
        texts = {0: "", 1: "", 2: ""}
        answers = events_of(response) if stream else [response.json()]
        for answer in answers:
            for choice in answer["choices"]:
                texts[choice["index"]] += choice["text"]
        assert set(texts.values()) == {"hello world"}
    assert response.status_code == 200
    assert len({request.request_id for request in server.engine.requests}) == 6
    assert len({request.sampling.seed for request in server.engine.requests}) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_text_and_the_request(server, stream):
    response = server.complete(stop=[" wor"], stream=stream)
    answers = events_of(response) if stream else [response.json()]
    assert "".join(answer["choices"][0]["text"] for answer in answers) == "hello"
    assert answers[-1]["choices"][0]["finish_reason"] == "stop"
    assert server.engine.num_closed_early == 1
    if not stream:
        assert answers[0]["usage"]["completion_tokens"] == len("hello wor")


def test_the_token_that_ends_the_text_is_counted_but_not_shown(server):
    server.engine.finish_reason = "stop"
    answer = server.complete(stop_token_ids=byte_ids(b"d")).json()
    assert answer["choices"][0]["text"] == "hello worl"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 11


def test_characters_are_whole_in_a_stream(server):
    server.engine.text = "你好 👋🏽"
    server.engine.num_bytes = 1
    events = events_of(server.complete(stream=True))
    texts = [event["choices"][0]["text"] for event in events]
    assert "".join(texts) == "你好 👋🏽"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)


def test_sampling_fields_reach_the_engine(server):
    server.complete(temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, seed=7, max_tokens=9)
    params = server.engine.requests[0].sampling
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 3)
    assert (params.min_p, params.seed, params.max_tokens) == (0.1, 7, 9)


def test_min_tokens_hold_back_ends_of_the_text(server):
    # "hello wor" is 9 tokens long, so " wor" is complete before the text may end.
    for min_tokens, expected in ((8, "hello"), (9, "hello world"), (11, "hello world")):
        answer = server.complete(stop=" wor", min_tokens=min_tokens).json()
        assert answer["choices"][0]["text"] == expected
        assert server.engine.requests[-1].sampling.min_tokens == min_tokens
    # A stop string that begins before and is complete later ends it.
    for min_tokens, expected in ((9, "hello wor"), (10, "hello wor"), (11, "hello world")):
        answer = server.complete(stop=["ld", " wo"], min_tokens=min_tokens).json()
        assert answer["choices"][0]["text"] == expected


def test_min_tokens_beyond_max_tokens(server):
    error = error_of(server.complete(min_tokens=20), 400)
    assert error["param"] == "min_tokens"
    assert "min_tokens is 20" in error["message"] and "16" in error["message"]
    error = error_of(server.chat(min_tokens=6, max_completion_tokens=5), 400)
    assert error["param"] == "min_tokens"


def test_what_a_template_shows(server):
    messages = [{"role": "user", "content": "hi", "name": "ann"}, {"role": "assistant"}]
    for fields, end in (({}, ""), ({"enable_thinking": False}, "(no thoughts)")):
        assert server.chat(messages=messages, chat_template_kwargs=fields).status_code == 200
        prompt = server.tokenizer.decode(server.engine.requests[-1].prompt_ids)
        assert prompt == "user ann: hiassistant: assistant: " + end


def test_an_argument_that_the_template_cannot_take(server, tmp_path):
    template = "{{ messages[0]['content'] + suffix }}"
    server.tokenizer = Tokenizer(make_tokenizer(tmp_path, chat_template=template))
    assert server.chat(chat_template_kwargs={"suffix": "!"}).status_code == 200
    assert error_of(server.chat(chat_template_kwargs={"suffix": 5}), 400)["param"] == "messages"


def test_a_prompt_without_special_tokens(server, tmp_path):
    server.tokenizer = Tokenizer(make_tokenizer(tmp_path, adds_bos=True))
    for fields, first in (({}, [1]), ({"add_special_tokens": False}, [])):
        server.complete(**fields)
        assert server.engine.requests[-1].prompt_ids == first + byte_ids(b"hi")


def test_models(server):
    server.get("/v1/models")
    cards = server.call(_list_after_a_miss).json()["data"]
    assert [card["id"] for card in cards] == ["base", "json", "sql"]
    assert (cards[0]["root"], cards[0]["parent"]) == ("/base", None)
    assert (cards[1]["root"], cards[1]["parent"]) == ("/adapters/json", "base")
    assert server.get("/v1/models/sql").json()["id"] == "sql"
    assert error_of(server.get("/v1/models/a/b"), 404)["param"] == "model"


async def _list_after_a_miss(client):
    # The fake has no long poll; asking for a model makes the ingress read the registry.
    await client.get("/v1/models/sql")
    return await client.get("/v1/models")


def test_load_is_seen_at_once(server):
    async def work(client):
        body = {"lora_name": "new", "lora_path": "/adapters/new"}
        loaded = await client.post("/v1/load_lora_adapter", json=body)
        assert loaded.json()["id"] == "new"
        listed = await client.get("/v1/models")
        assert "new" in [card["id"] for card in listed.json()["data"]]
        assert (await client.post("/v1/load_lora_adapter", json=body)).status_code == 400
        again = await client.post("/v1/load_lora_adapter", json={**body, "load_inplace": True})
        assert again.status_code == 200
        await client.post("/v1/completions", json={"model": "new", "prompt": "x"})
        assert server.engine.requests[-1].adapter_id == "new-v2"
        assert (
            await client.post("/v1/unload_lora_adapter", json={"lora_name": "new"})
        ).status_code == 200
        return await client.post("/v1/completions", json={"model": "new", "prompt": "x"})

    error_of(server.call(work), 404)


def test_a_load_names_the_base_model(server):
    body = {"lora_path": "/adapters/new", "lora_int_id": 7, "pinned": False}
    for index, base in enumerate(("base", "/base", None)):
        fields = {**body, "lora_name": f"new-{index}", "base_model_name": base}
        assert server.post("/v1/load_lora_adapter", fields).status_code == 200
    fields = {**body, "lora_name": "other", "base_model_name": "other/base"}
    error = error_of(server.post("/v1/load_lora_adapter", fields), 400)
    assert error["param"] == "base_model_name"
    assert all(name in error["message"] for name in ("'other/base'", "'base'", "'/base'"))
    assert "other" not in server.registry.records
    unload = {"lora_name": "new-0", "lora_int_id": 7}
    assert server.post("/v1/unload_lora_adapter", unload).status_code == 200


@pytest.mark.parametrize("name", ["base", "", " a", "a\n", "ä", "x" * 129])
def test_a_name_that_no_adapter_can_have(server, name):
    body = {"lora_name": name, "lora_path": "/x", "load_inplace": True}
    error = error_of(server.post("/v1/load_lora_adapter", body), 400)
    assert error["param"] == "lora_name" and "adapter name" in error["message"]


def test_unload_of_an_unknown_adapter(server):
    error = error_of(server.post("/v1/unload_lora_adapter", {"lora_name": "x"}), 404)
    assert error["param"] == "lora_name"


def test_unknown_model(server):
    error = error_of(server.complete(model="nope"), 404)
    assert (error["type"], error["param"]) == ("NotFoundError", "model")
    assert "nope" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "numbers"),
    [
        ({"max_tokens": 99}, "max_tokens", ["2", "99", "100"]),
        ({"prompt": "x" * 100}, "prompt", ["100"]),
        ({"prompt": [VOCAB_SIZE]}, "prompt", [str(VOCAB_SIZE)]),
        ({"prompt": [-1]}, "prompt", ["-1"]),
        ({"stop_token_ids": [5, VOCAB_SIZE]}, "stop_token_ids", [str(VOCAB_SIZE)]),
        ({"stop_token_ids": [-1]}, "stop_token_ids", ["-1"]),
        ({"max_tokens": 0}, "max_tokens", ["0"]),
        ({"temperature": -1}, "temperature", ["-1"]),
    ],
)
def test_what_the_model_cannot_take(server, fields, param, numbers):
    error = error_of(server.complete(**fields), 400)
    assert error["param"] == param
    assert all(number in error["message"] for number in numbers)
    assert server.engine.requests == []


def test_stop_token_ids_of_a_chat(server):
    error = error_of(server.chat(stop_token_ids=[VOCAB_SIZE]), 400)
    assert error["param"] == "stop_token_ids"


def test_the_limit_is_named_as_it_was_given(server):
    error = error_of(server.chat(max_completion_tokens=99), 400)
    assert error["param"] == "max_completion_tokens"


def test_default_length_is_what_fits(server):
    server.complete(model="sql", prompt="x" * 60)
    # Beside the adapter's 2 pages, the pool of 6 holds 64 tokens.
    assert server.engine.requests[0].sampling.max_tokens == 4


def test_template_that_refuses(server):
    messages = [{"role": "assistant", "content": "x" * 200}]
    assert error_of(server.chat(messages=messages), 400)["param"] == "messages"


def test_malformed_bodies(server):
    async def work(client):
        return [await client.post("/v1/completions", content=body) for body in (b"", b"{", b"[1]")]

    for response in server.call(work):
        assert error_of(response, 400)["type"] == "BadRequestError"


def test_a_large_body_is_parsed_beside_the_event_loop(server, monkeypatch):
    threads = []

    def parse(model, body):
        threads.append(threading.current_thread())
        return parse_body(model, body)

    monkeypatch.setattr("app.http.routes.parse_body", parse)
    monkeypatch.setattr("app.http.routes.LARGE_BODY_BYTES", 1000)
    assert server.complete().status_code == 200
    error_of(server.complete(prompt="x" * 1000), 400)
    small, large = threads
    assert small is threading.main_thread() and large is not small


def test_body_over_the_limit(server):
    error = error_of(server.complete(prompt="x" * 20_000), 413)
    assert "10000" in error["message"]


def test_routes_that_do_not_exist(server):
    assert "/v1/nothing" in error_of(server.get("/v1/nothing"), 404)["message"]
    error_of(server.get("/v1/completions"), 405)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequestError("too long for the pool"), 400),
        (EngineDeadError("the engine process ended"), 503),
        (KeyError("a defect"), 500),
    ],
)
def test_an_early_error_has_a_status_of_its_own(server, stream, error, status):
    server.engine.errors[0] = error
    error_of(server.complete(stream=stream), status)


def test_a_late_error_is_an_event(server):
    server.engine.errors[2] = EngineDeadError("the engine process ended")
    response = server.complete(stream=True)
    assert response.status_code == 200
    lines = [line for line in response.text.split("\n\n") if line]
    assert len(lines) == 3
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("ServiceUnavailableError", 503)


def test_a_late_error_of_a_whole_answer_is_a_status(server):
    server.engine.errors[2] = EngineDeadError("the engine process ended")
    error_of(server.complete(), 503)


def test_one_failed_prompt_ends_the_others(server):
    server.engine.delay_s = 0.01
    server.engine.errors[3] = EngineDeadError("dead")
    error_of(server.complete(prompt=["a", "b"]), 503)


class RenewingEngine(FakeEngine):
    """Its replicas no longer have the first adapter that they are asked for."""

    error: Exception = InvalidAdapterError("the files have changed")

    async def generate(self, request, record, renew):
        self.requests.append(request)
        newer = await renew(record, self.error)
        renewed = replace(request, adapter_id=newer.adapter_id)
        async for delta in super().generate(renewed, newer, renew):
            yield delta


@pytest.fixture
def renewing(server):
    server.engine = RenewingEngine()
    return server


def test_an_adapter_replaced_on_the_way_is_looked_up_again(renewing):
    async def work(client):
        await client.get("/v1/models/sql")
        # The registry moves on unseen, and the store knows the old version no more.
        await renewing.registry.load("sql", "/adapters/sql", replace=True)
        return await client.post("/v1/completions", json={"model": "sql", "prompt": "x"})

    assert renewing.call(work).status_code == 200
    adapter_ids = [request.adapter_id for request in renewing.engine.requests]
    assert adapter_ids == ["sql-v1", "sql-v2"]


def test_an_adapter_that_nothing_has_is_503_with_a_time_to_try_again(renewing):
    renewing.engine.error = AdapterUnavailableError("nothing has the bytes of 'sql'")
    response = renewing.complete(model="sql")
    error = error_of(response, 503)
    assert (error["param"], error["message"]) == ("model", "nothing has the bytes of 'sql'")
    assert int(response.headers["Retry-After"]) > 0


def test_an_adapter_unloaded_on_the_way_is_404(renewing):
    async def work(client):
        await client.get("/v1/models/sql")
        await renewing.registry.unload("sql")
        return await client.post("/v1/completions", json={"model": "sql", "prompt": "x"})

    error_of(renewing.call(work), 404)


def test_an_adapter_whose_files_are_not_what_was_loaded(renewing):
    error = error_of(renewing.complete(model="sql"), 400)
    assert (error["param"], error["message"]) == ("model", "the files have changed")


def test_unknown_models_asked_at_once_share_a_look_up(server):
    async def work(client):
        body = {"model": "nope", "prompt": "x"}
        await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(20)))

    server.call(work)
    assert server.registry.num_asked <= 3


def test_health(server):
    assert server.get("/health").json() == {"status": "ok"}
    server.is_ready = False
    error_of(server.get("/health"), 503)


# What an HTTP server says of a completion.
SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/completions",
    "raw_path": b"/v1/completions",
    "query_string": b"",
    "headers": [],
}


def statuses_when_leaving(server, body, is_whole=True, error=None):
    """Send a body and leave, which may raise; the statuses of what is answered nevertheless."""
    incoming = [
        {"type": "http.request", "body": body, "more_body": not is_whole},
        {"type": "http.disconnect"},
    ]
    statuses = []

    async def receive():
        if len(incoming) == 1:
            await asyncio.sleep(0.05)
            if error is not None:
                raise error
        return incoming.pop(0) if incoming else await asyncio.sleep(100)

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    asyncio.run(asyncio.wait_for(server.make_app()(SCOPE, receive, send), timeout=2))
    return statuses


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token(server, stream):
    server.engine.delay_s = 5.0
    body = json.dumps({"model": "base", "prompt": "hi", "stream": stream}).encode()
    assert statuses_when_leaving(server, body) == [499]
    assert server.engine.num_closed_early == 1


@pytest.mark.parametrize(
    "error", [TaskCancelledError(), ActorUnavailableError("the proxy", b"x" * 16)]
)
def test_a_stream_whose_connection_serve_has_lost_is_no_error(server, error):
    """Asked whether the client is still there, Serve raises."""
    engine, sent = server.engine, []
    engine.text, engine.delay_s = "x" * 90, 0.01
    body = json.dumps({"model": "base", "prompt": "a", "stream": True, "max_tokens": 90})
    incoming = [{"type": "http.request", "body": body.encode(), "more_body": False}]

    async def receive():
        if incoming:
            return incoming.pop(0)
        while len(sent) < 3:
            await asyncio.sleep(0.01)
        raise error

    async def send(message):
        sent.append(message)

    async def main():
        scope = {**SCOPE, "asgi": {"version": "3.0", "spec_version": "2.3"}}
        await server.make_app()(scope, receive, send)

    asyncio.run(main())
    assert engine.num_closed_early == 1 and sent[0]["status"] == 200


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
@pytest.mark.parametrize("num_turns", range(8))
def test_a_stream_cancelled_just_after_its_first_token_is_closed(server, prompt, num_turns):
    engine, tasks = server.engine, []
    engine.text, engine.delay_s = "x" * 90, 0.01
    generate = engine.generate

    def leave_soon(turns):
        if turns:
            asyncio.get_running_loop().call_soon(leave_soon, turns - 1)
        else:
            tasks[0].cancel()

    async def generate_and_leave(request, *arguments):
        deltas = generate(request, *arguments)
        try:
            async for delta in deltas:
                if len(tasks) == 1:
                    tasks.append(asyncio.current_task())
                    leave_soon(num_turns)
                yield delta
        finally:
            await deltas.aclose()

    engine.generate = generate_and_leave
    body = json.dumps({"model": "base", "prompt": prompt, "stream": True, "max_tokens": 90})
    incoming = [{"type": "http.request", "body": body.encode(), "more_body": False}]

    async def receive():
        return incoming.pop(0) if incoming else await asyncio.sleep(100)

    async def send(message):
        pass

    async def main():
        scope = {**SCOPE, "asgi": {"version": "3.0", "spec_version": "2.4"}}
        tasks.append(asyncio.create_task(server.make_app()(scope, receive, send)))
        await asyncio.gather(tasks[0], return_exceptions=True)
        assert tasks[0].cancelled()
        # No reader of a prompt runs on.
        assert asyncio.all_tasks() - {asyncio.current_task()} == set()
        assert engine.num_closed_early == len(engine.requests) > 0

    asyncio.run(main())


@pytest.mark.parametrize("error", [None, TaskCancelledError()])
def test_a_client_that_leaves_while_it_sends_is_no_defect(server, caplog, error):
    assert statuses_when_leaving(server, b'{"model": ', is_whole=False, error=error) == [499]
    assert caplog.records == []
    assert server.engine.requests == []


def test_openai_client(server):
    async def work(client):
        answer = await client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hi"}]
        )
        assert answer.choices[0].message.content == "hello world"
        stream = await client.completions.create(model="sql", prompt="x", stream=True)
        assert "".join([c.choices[0].text async for c in stream]) == "hello world"
        assert [m.id async for m in await client.models.list()][0] == "base"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.completions.create(model="nope", prompt="x")
        assert caught.value.body["param"] == "model"
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.completions.create(model="base", prompt="x", temperature=-1)
        server.engine.errors[2] = EngineDeadError("the engine process ended")
        stream = await client.completions.create(model="base", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="engine process ended"):
            async for _ in stream:
                pass

    server.openai(work)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_where_there_is_no_room_not_even_the_body_is_read(server, path):
    with server.backlog.waiting(5):
        answer = server.call(lambda client: client.post(path, content=b"{"))
    assert "1 requests wait, as many as may" in error_of(answer, 503)["message"]
    assert answer.headers["Retry-After"] == str(DEFAULT_RETRY_AFTER_S)
    error_of(server.call(lambda client: client.post(path, content=b"{")), 400)


@pytest.mark.parametrize(
    ("body", "header", "timeout_s"),
    [
        ({"timeout": 5}, None, 5.0),
        ({}, "2.5", 2.5),
        ({"timeout": 5}, "2.5", 2.5),
        ({"timeout": 0.5}, "30", 0.5),
        ({"timeout": None}, None, None),
    ],
)
def test_the_shorter_timeout_makes_the_deadline(server, body, header, timeout_s):
    headers = {} if header is None else {"X-Request-Timeout": header}
    asked = {"model": "base", "prompt": "hi", **body}
    before = time.time()
    answer = server.call(lambda client: client.post("/v1/completions", json=asked, headers=headers))
    assert answer.status_code == 200
    [request] = server.engine.requests
    if timeout_s is None:
        assert request.deadline is None
    else:
        assert before + timeout_s <= request.deadline <= time.time() + timeout_s


@pytest.mark.parametrize("header", ["", "soon", "0", "-1", "nan", "inf"])
def test_a_timeout_that_is_none_is_refused(server, header):
    headers = {"X-Request-Timeout": header}
    asked = {"model": "base", "prompt": "hi"}
    answer = server.call(lambda client: client.post("/v1/completions", json=asked, headers=headers))
    error = error_of(answer, 400)
    assert repr(header) in error["message"] and error["param"] == "X-Request-Timeout"
    for value in (0, -1, "5"):
        assert error_of(server.complete(timeout=value), 400)["param"] == "timeout"
    assert not server.engine.requests


def test_lifespan_runs(tokenizer):
    seen = []

    @asynccontextmanager
    async def lifespan(app):
        seen.append("start")
        yield
        seen.append("stop")

    from starlette.testclient import TestClient

    ingress = Ingress(None, None, None, None, None)
    with TestClient(api_app(ingress, lifespan)):
        assert seen == ["start"]
    assert seen == ["start", "stop"]


ADMIN = [
    ("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "p"}),
    ("/v1/unload_lora_adapter", {"lora_name": "sql"}),
]


@pytest.mark.parametrize(("path", "body"), ADMIN)
@pytest.mark.parametrize("content_type", ["text/plain", "", "application/x-www-form-urlencoded"])
def test_a_web_page_cannot_change_the_server_by_a_form(server, path, body, content_type):
    async def work(client):
        headers = {"Content-Type": content_type} if content_type else {}
        return await client.post(path, content=json.dumps(body).encode(), headers=headers)

    error = error_of(server.call(work), 415)
    assert error["type"] == "UnsupportedMediaTypeError" and "application/json" in error["message"]
    assert set(server.registry.records) == {"sql", "json"}


@pytest.mark.parametrize(("path", "body"), ADMIN)
@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://slora:8001", "https://slora.evil.example"]
)
def test_a_page_of_another_site_cannot_change_the_server(server, path, body, origin):
    answer = server.call(lambda client: client.post(path, json=body, headers={"Origin": origin}))
    assert "may not change this server, which is slora" in error_of(answer, 403)["message"]
    assert set(server.registry.records) == {"sql", "json"}


@pytest.mark.parametrize("headers", [{}, {"Origin": "http://slora"}, {"Origin": "http://SLORA"}])
def test_its_own_pages_and_programs_can(server, headers):
    path, body = ADMIN[1]
    headers = {**headers, "Content-Type": "Application/JSON; charset=utf-8"}
    content = json.dumps(body).encode()
    answer = server.call(lambda client: client.post(path, content=content, headers=headers))
    assert answer.status_code == 200 and set(server.registry.records) == {"json"}


def test_a_prompt_of_megabytes_is_refused_by_its_beginning(tokenizer):
    server = Server(tokenizer)
    server.max_body_bytes = 2**24
    text = "hello world " * (2**23 // 12)
    started = time.process_time()
    for answer, param in (
        (server.complete(prompt=text), "prompt"),
        (server.chat(messages=[{"role": "user", "content": text}]), "messages"),
    ):
        error = error_of(answer, 400)
        assert error["param"] == param and "has more than 99 tokens" in error["message"]
    # All of it, the reading of the JSON too; to encode the texts takes more than ten times as long.
    assert time.process_time() - started < 1.5


class TestAStreamThatWaits:
    """Its first token comes later than somebody on the way may wait for a sign of life."""

    @staticmethod
    def stream(server):
        async def run():
            transport = httpx.ASGITransport(server.make_app())
            async with httpx.AsyncClient(transport=transport, base_url="http://slora") as client:
                body = {"model": "base", "prompt": "hi", "stream": True}
                answer = await client.post("/v1/completions", json=body, timeout=None)
                return answer, asyncio.get_running_loop().time()

        return run_in_virtual_time(run())

    def test_has_a_status_and_comments(self, server):
        server.engine.delay_s = 12.0
        answer, _ = self.stream(server)
        assert answer.status_code == 200
        lines = answer.text.split("\n\n")
        # After 5 s and 10 s.
        assert lines[:2] == [": the request waits"] * 2 and lines[2].startswith("data: {")
        assert not any(line.startswith(":") for line in lines[2:])
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == "hello world"

    def test_that_fails_late_has_an_error_event(self, server):
        server.engine.delay_s = 7.0
        server.engine.errors = {0: EngineDeadError("dead")}
        answer, _ = self.stream(server)
        assert answer.status_code == 200
        comment, event, end = answer.text.split("\n\n")
        assert comment == ": the request waits" and end == ""
        assert json.loads(event.removeprefix("data: "))["error"]["code"] == 503

    def test_that_fails_early_has_a_status(self, server):
        server.engine.delay_s = 4.0
        server.engine.errors = {0: EngineDeadError("dead")}
        assert self.stream(server)[0].status_code == 503

    def test_is_aborted_as_soon_as_its_client_leaves(self, server):
        async def run():
            app = server.make_app()
            sent = []
            left = asyncio.Event()

            async def receive():
                if not sent_body:
                    sent_body.append(True)
                    body = json.dumps({"model": "base", "prompt": "hi", "stream": True}).encode()
                    return {"type": "http.request", "body": body, "more_body": False}
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message)

            sent_body = []
            scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
            scope |= {"query_string": b"", "raw_path": b"/v1/completions", "root_path": ""}
            serving = asyncio.create_task(app(scope, receive, send))
            await asyncio.sleep(8)
            assert sent[0]["status"] == 200 and server.engine.num_closed_early == 0
            left.set()
            await asyncio.sleep(1)
            assert server.engine.num_closed_early == 1
            await serving

        server.engine.delay_s = 100.0
        run_in_virtual_time(run())


def test_a_stop_string_that_is_a_special_token_ends_the_text(server):
    server.complete(stop=["</s>", "x"], stop_token_ids=[7])
    [request] = server.engine.requests
    assert request.sampling.stop == ("</s>", "x")
    assert request.sampling.stop_token_ids == (7, 2)


def test_ends_that_the_model_has_no_logits_of_are_left_out(server, tmp_path):
    """They can end nothing, and would be looked up among the logits where min_tokens masks ends."""
    path = make_tokenizer(tmp_path) / "tokenizer.json"
    fields = json.loads(path.read_text())
    extra = {**fields["added_tokens"][0], "id": VOCAB_SIZE, "content": "<extra>"}
    path.write_text(json.dumps({**fields, "added_tokens": [*fields["added_tokens"], extra]}))
    server.tokenizer = Tokenizer(tmp_path)
    assert server.tokenizer.special_token_id("<extra>") == VOCAB_SIZE
    server.registry.records["sql"] = make_record("sql", text=AdapterText((5, VOCAB_SIZE)))
    assert server.complete(model="sql", stop=["<extra>"], min_tokens=2).status_code == 200
    [request] = server.engine.requests
    assert request.sampling.stop_token_ids == (5,)
    assert server.get("/v1/models/sql").json()["eos_token_ids"] == [2, 5]


def test_the_models_defaults_hold_where_a_request_is_silent(server):
    server.defaults = GenerationDefaults(temperature=0.7, top_p=0.8, top_k=20, min_p=0.1)
    server.complete()
    server.chat(temperature=0, top_k=-1)
    silent, given = (request.sampling for request in server.engine.requests)
    assert (silent.temperature, silent.top_p, silent.top_k, silent.min_p) == (0.7, 0.8, 20, 0.1)
    assert (given.temperature, given.top_p, given.top_k, given.min_p) == (0, 0.8, 0, 0.1)
    for card in server.get("/v1/models").json()["data"]:
        assert card["default_sampling"] == {
            "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1
        }  # fmt: skip
        assert card["eos_token_ids"] == [2]
