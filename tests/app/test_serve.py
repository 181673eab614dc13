"""The application on a real Ray cluster: two replicas of a tiny random model."""

import json
import os
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from slora_core.requests import Request, SamplingParams
from slora_core.text.tokenizer import Tokenizer
from tests.app.api_errors import error_of
from tests.app.ray_actors import kill_named_actor
from tests.app.serve_app import (
    ADAPTERS,
    ALL_MODULES,
    BASE,
    CONTEXT_LEN,
    NUM_POOL_TOKENS,
    PAGE_TOKENS,
    running_app,
    wait_until,
)
from tests.factories import make_random_adapter

pytestmark = pytest.mark.serve

NUM_REPLICAS = 2
SPILL_QUEUE_LEN = 4
# Far more than a step of the tiny model takes, also on a busy machine.
STALL_TIMEOUT_S = 6


@pytest.fixture(scope="module")
def app(ray_cluster, tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    with running_app(
        ray_cluster,
        root,
        "slora",
        "/",
        num_replicas=NUM_REPLICAS,
        spill_queue_len=SPILL_QUEUE_LEN,
        max_body_bytes=2**20,
        engine_stall_timeout_s=STALL_TIMEOUT_S,
        registry_state_path=str(root / "registry.json"),
    ) as app:
        yield app


@pytest.fixture(autouse=True)
def nothing_is_left(app):
    """Whatever a test does, the next one finds idle engines that have lost no page."""
    yield
    app.wait_idle()
    app.check_integrity()


@pytest.fixture
def client(app):
    return openai.OpenAI(api_key="none", base_url=f"{app.url}/v1", max_retries=0)


def test_openai_client(client):
    names = [model.id for model in client.models.list()]
    assert names[0] == BASE and set(ADAPTERS) <= set(names)
    messages = [{"role": "user", "content": "hi"}]
    for model in (BASE, ADAPTERS[0]):
        options = {"model": model, "messages": messages, "max_tokens": 12, "temperature": 0}
        answer = client.chat.completions.create(**options)
        assert answer.usage.completion_tokens <= 12
        stream = client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == answer.choices[0].message.content
        streamed, whole = chunks[-1].usage, answer.usage
        assert streamed.prompt_tokens == whole.prompt_tokens
        assert streamed.completion_tokens == whole.completion_tokens


def test_openai_exceptions(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nope", prompt="x")
    assert (caught.value.body["param"], caught.value.body["code"]) == ("model", 404)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model=BASE, prompt="x", max_tokens=CONTEXT_LEN)
    with pytest.raises(openai.BadRequestError, match="n=2"):
        client.completions.create(model=BASE, prompt="x", n=2)


def test_a_requests_id_is_in_its_answer_and_at_each_hop_and_no_text_is_in_any_log(app, client):
    import ray

    marker, headers = "Xyzzyplugh", {"X-Request-Id": "request-of-a-tenant"}
    given = client.completions.create(
        model=ADAPTERS[0], prompt=marker, max_tokens=4, extra_headers=headers
    )
    assert given._request_id == "request-of-a-tenant"
    assert given.id.startswith("cmpl-request-of-a-tenant-")
    messages = [{"role": "user", "content": marker}]
    drawn = client.chat.completions.create(model=BASE, messages=messages, max_tokens=4)
    assert drawn.id.startswith(f"chatcmpl-{drawn._request_id}-")
    with app.stream(prompt=marker, max_tokens=4, headers=headers) as response:
        assert response.headers.get_list("x-request-id") == ["request-of-a-tenant"]
        response.read()
    for fields in ({"model": marker}, {"top_p": marker}, {marker: 1}, {"max_tokens": 10**6}):
        assert app.complete(**{"prompt": marker, **fields}).status_code in (400, 404)
    session = Path(ray._private.worker._global_node.get_logs_dir_path())

    def lines():
        return [
            line
            for path in session.glob("serve/replica_slora_ingress_*.log")
            for line in path.read_text().splitlines()
            if "answer_id=cmpl-request-of-a-tenant-" in line
        ]

    wait_until(lambda: len(lines()) == 2, timeout_s=5)
    assert f"model={ADAPTERS[0]} adapter_version=1" in lines()[0]
    assert "output_tokens=4" in lines()[0] and f"model={BASE}" in lines()[1]
    # The engines' and the stores' own lines are among them.
    files = [path for path in session.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert marker.encode() not in path.read_bytes(), path


def test_fields_of_other_servers_clients(app):
    messages = [
        {"role": "user", "name": "ann", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": "more"},
    ]
    body = {
        "model": ADAPTERS[0],
        "messages": messages,
        "max_tokens": 8.0,
        "min_tokens": 8,
        "stop": "",
        "skip_special_tokens": True,
        "add_generation_prompt": True,
        "chat_template_kwargs": {"enable_thinking": False},
        "stream": True,
        "stream_options": {"continuous_usage_stats": True},
    }
    answer = httpx.post(f"{app.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    usages = [json.loads(event)["usage"] for event in events]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 8
    prompt = "<s>user ann: hi</s><s>assistant: </s><s>user: more</s><s>assistant: (no thoughts)"
    num_prompt = len(Tokenizer(app.model).encode(prompt))
    assert {usage["prompt_tokens"] for usage in usages} == {num_prompt}


def test_nothing_ends_a_text_before_its_min_tokens(app):
    # Half of the tokens there are.
    stops = {"stop_token_ids": list(range(0, 256, 2)), "max_tokens": 30}
    for model in (BASE, ADAPTERS[0]):
        for temperature in (0, 1):
            options = {**stops, "temperature": temperature, "seed": 1}
            early = app.complete(model, **options).json()
            assert early["choices"][0]["finish_reason"] == "stop"
            assert early["usage"]["completion_tokens"] < 25
            late = app.complete(model, **options, min_tokens=25).json()
            assert late["usage"]["completion_tokens"] > 25
    error = error_of(app.complete(min_tokens=31, max_tokens=30), 400)
    assert error["param"] == "min_tokens"


def test_an_adapters_own_template_and_ends(app):
    """Of one with the weights of another, so that what it says is the other's up to its end."""
    folder = shutil.copytree(app.adapters_dir / ADAPTERS[0], app.extra_dir / "own-text")
    (folder / "chat_template.jinja").write_text(
        "{%- generation %}{{ messages[0].content }}{%- endgeneration %}{{ bos_token }}"
    )
    ends = list(range(0, 256, 2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    card = app.load("own-text", folder).json()
    assert set(card["eos_token_ids"]) == {*ends, 2} and card["warnings"] == []
    # A template is of the name, not of the weights.
    options = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}

    def chat(**fields):
        url = f"{app.url}/v1/chat/completions"
        return httpx.post(url, json={**options, "max_tokens": 30, **fields}, timeout=60).json()

    own, forced = chat(model="own-text"), chat(model="own-text", ignore_eos=True)
    prompt = "hello<s>"
    assert own["usage"]["prompt_tokens"] == len(Tokenizer(app.model).encode(prompt))
    assert chat(model=ADAPTERS[0])["usage"]["prompt_tokens"] > own["usage"]["prompt_tokens"]
    assert own["choices"][0]["finish_reason"] == "stop"
    assert forced["choices"][0]["finish_reason"] == "length"
    plain = app.complete(ADAPTERS[0], prompt=prompt, max_tokens=30, stop_token_ids=ends).json()
    assert own["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    assert own["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"] < 30
    assert app.unload("own-text").status_code == 200


def test_usage_tells_what_of_a_prompt_was_cached(app):
    prompt = "what two requests have in common " * 4
    num_cached = []
    for tail in ("one", "two"):
        usage = app.complete(ADAPTERS[1], prompt=prompt + tail).json()["usage"]
        num_cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    num_shared = len(Tokenizer(app.model).encode(prompt))
    assert num_cached == [0, num_shared // PAGE_TOKENS * PAGE_TOKENS]


def test_each_name_answers_as_its_own_weights_do(app):
    engine = Engine.from_pretrained(app.model, EngineConfig())
    tokenizer = Tokenizer(app.model)

    def expected(name):
        adapter_id = None
        if name != BASE:
            adapter = load_packed_adapter(app.adapters_dir / name, engine.geometry)
            engine.add_adapter(adapter)
            adapter_id = adapter.adapter_id
        params = SamplingParams(max_tokens=8, temperature=0)
        request = Request(tokenizer.encode("hello"), params, adapter_id)
        return tokenizer.decode(engine.generate([request])[0])

    texts = {name: expected(name) for name in [BASE, *ADAPTERS]}
    assert len(set(texts.values())) == len(texts), "equal texts would hide a mix-up"
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(app.complete, texts))
    actual = [answer.json()["choices"][0]["text"] for answer in answers]
    assert actual == list(texts.values())


def test_several_prompts_in_one_request(client):
    """More of them than Serve's routers try at one time, beside another request."""
    prompts = [f"prompt {index}" for index in range(2 * NUM_REPLICAS + 3)]
    options = {"model": ADAPTERS[0], "max_tokens": 6, "temperature": 0, "timeout": 60}
    alone = [
        client.completions.create(prompt=prompt, **options).choices[0].text for prompt in prompts
    ]
    answer = client.completions.create(prompt=prompts, **options)
    assert [choice.text for choice in answer.choices] == alone
    with client.completions.create(prompt=prompts, stream=True, **options) as stream:
        assert client.completions.create(prompt=prompts[0], **options).choices[0].text == alone[0]
        streamed = [""] * len(prompts)
        for chunk in stream:
            for choice in chunk.choices:
                streamed[choice.index] += choice.text
    assert streamed == alone


def test_an_adapter_keeps_its_replica(app):
    # Of which no test has just asked many at once: those are spread for a while.
    for name in ADAPTERS[4:8]:
        before = app.finished()
        for _ in range(20):
            assert app.complete(name, max_tokens=1).status_code == 200
        counts = app.finished() - before
        assert sum(counts.values()) == 20
        assert max(counts.values()) >= 19


def test_adapters_spread_over_the_replicas(app):
    before = app.finished()
    for name in ADAPTERS:
        assert app.complete(name, max_tokens=1).status_code == 200
    counts = app.finished() - before
    assert sum(counts.values()) == len(ADAPTERS)
    assert len(counts) == NUM_REPLICAS


def test_a_hot_adapter_spills_over(app):
    before = app.finished()
    with ThreadPoolExecutor(24) as pool:
        answers = pool.map(
            lambda _: app.complete(ADAPTERS[0], max_tokens=100, ignore_eos=True), range(48)
        )
    assert [answer.status_code for answer in answers] == [200] * 48
    counts = app.finished() - before
    assert len(counts) == NUM_REPLICAS
    assert min(counts.values()) >= 8


def test_a_conversation_of_the_base_model_finds_its_prefix(app):
    """Each on a replica of its own, whose prefix cache has what the turns before computed."""
    before = app.finished()
    for number in range(8):
        messages = [{"role": "user", "content": f"conversation {number}, which is about a thing"}]
        num_prompt_tokens = 0
        for _ in range(3):
            body = {"model": BASE, "messages": messages, "max_tokens": 16, "temperature": 0}
            answer = httpx.post(f"{app.url}/v1/chat/completions", json=body, timeout=60).json()
            usage = answer["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert cached >= num_prompt_tokens // PAGE_TOKENS * PAGE_TOKENS
            num_prompt_tokens = usage["prompt_tokens"]
            messages.append(answer["choices"][0]["message"])
            messages.append({"role": "user", "content": "and then?"})
    counts = app.finished() - before
    assert len(counts) == NUM_REPLICAS


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(app, stream):
    num_aborted = sum(stats["num_aborted"] for stats in app.stats())
    body = {"model": ADAPTERS[1], "prompt": "hi", "max_tokens": 2000, "ignore_eos": True}
    content = json.dumps({**body, "stream": stream})
    host, port = app.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}"
        connection.sendall(f"{head}\r\n\r\n{content}".encode())
        wait_until(lambda: sum(stats["num_kv_pages"] for stats in app.stats()) > 0, timeout_s=5)
    app.wait_idle(timeout_s=5)
    assert sum(stats["num_aborted"] for stats in app.stats()) == num_aborted + 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_ends_what_runs_and_what_waits_and_frees_its_pages(app, stream):
    """Of more prompts than fit the engines' pools, so that some of them wait."""
    asked = {"prompt": ["hello"] * 32, "max_tokens": 2000, "ignore_eos": True}
    before = time.monotonic()
    answer = app.complete(ADAPTERS[0], stream=stream, timeout=1.5, **asked)
    assert 1.5 <= time.monotonic() - before < 4
    if stream:
        error = json.loads(answer.text.split("data: ")[-1])["error"]
    else:
        error = error_of(answer, 504)
    assert (error["type"], error["code"], error["param"]) == ("TimeoutError", 504, "timeout")
    app.wait_idle(timeout_s=2)


def test_a_stop_string_ends_the_request_in_the_engine_and_is_no_abort(app):
    def count(name):
        return sum(stats[name] for stats in app.stats())

    before = {name: count(name) for name in ("num_finished", "num_aborted")}
    stops = [chr(letter) for letter in range(ord("a"), ord("p"))]
    answer = app.complete(max_tokens=2000, ignore_eos=True, stop=stops).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert not set(answer["choices"][0]["text"]) & set(stops)
    app.wait_idle(timeout_s=3)
    wait_until(lambda: count("num_finished") == before["num_finished"] + 1, timeout_s=5)
    assert count("num_aborted") == before["num_aborted"]


BAD_REQUESTS = [
    (404, "model", {"model": "nope"}),
    (400, "prompt", {"prompt": ""}),
    (400, "prompt", {"prompt": []}),
    (400, "prompt", {"prompt": 5}),
    (400, "prompt", {"prompt": "x" * CONTEXT_LEN}),
    (400, "max_tokens", {"max_tokens": CONTEXT_LEN}),
    (400, "max_tokens", {"max_tokens": -1}),
    (400, "max_tokens", {"max_tokens": "many"}),
    (400, "temperature", {"temperature": -0.5}),
    (400, "temperature", {"temperature": "hot"}),
    (400, "top_p", {"top_p": 2}),
    (400, "top_k", {"top_k": -7}),
    (400, "seed", {"seed": 1.5}),
    (400, "n", {"n": 2}),
    (400, "presence_penalty", {"presence_penalty": 1}),
    (400, "logprobs", {"logprobs": 3}),
    (400, "tempratur", {"tempratur": 1}),
    (413, None, {"prompt": "x" * 2**20}),
]


@pytest.mark.parametrize(("status", "param", "fields"), BAD_REQUESTS)
def test_bad_requests(app, status, param, fields):
    fields = {"model": BASE, **fields}
    assert error_of(app.complete(**fields), status)["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "base", "temperature": NaN}'])
def test_malformed_json(app, body):
    error_of(httpx.post(f"{app.url}/v1/chat/completions", content=body), 400)


def test_a_request_that_never_fits_beside_its_adapter(app):
    path = make_random_adapter(
        app.extra_dir / "big", app.model, rank=160, target_modules=ALL_MODULES, scale=0.01
    )
    card = app.load("big", path).json()
    assert (card["id"], card["parent"], card["root"]) == ("big", BASE, str(path))
    error = error_of(app.complete("big", max_tokens=CONTEXT_LEN - 100), 400)
    assert str(NUM_POOL_TOKENS // PAGE_TOKENS) in error["message"]
    assert app.complete("big").status_code == 200
    assert app.complete(max_tokens=CONTEXT_LEN - 100, stop=["e"]).status_code == 200
    assert app.unload("big").status_code == 200


def test_an_adapter_too_large_for_the_pool(app):
    path = make_random_adapter(
        app.extra_dir / "huge", app.model, rank=256, target_modules=ALL_MODULES
    )
    message = error_of(app.load("huge", path), 400)["message"]
    assert str(NUM_POOL_TOKENS // PAGE_TOKENS) in message
    assert "huge" not in app.names()


def test_bad_adapters(app):
    def adapter(name, **fields):
        return make_random_adapter(app.extra_dir / name, app.model, **fields)

    for name in (BASE, "a b"):
        assert error_of(app.load(name, adapter("good")), 400)["param"] == "lora_name"
    dora = adapter("dora", use_dora=True)
    assert "use_dora" in error_of(app.load("bad", dora), 400)["message"]
    bias = adapter("bias", bias="all")
    assert "bias" in error_of(app.load("bad", bias), 400)["message"]
    pattern = adapter("pattern", rank_pattern={"(?=q)": 4})
    assert "rank_pattern" in error_of(app.load("bad", pattern), 400)["message"]
    pickled = adapter("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "safetensors" in error_of(app.load("bad", pickled), 400)["message"]
    truncated = adapter("truncated")
    weights = truncated / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    error_of(app.load("bad", truncated), 400)
    error_of(app.load("bad", app.extra_dir / "missing"), 400)
    assert "bad" not in app.names()


def test_what_is_unusual_is_told_and_served(app):
    path = make_random_adapter(app.extra_dir / "saved", app.model, modules_to_save=["lm_head"])
    answer = app.load("unusual", path)
    [warning] = answer.json()["warnings"]
    assert answer.status_code == 200 and "modules_to_save" in warning and "lm_head" in warning
    assert app.complete("unusual").status_code == 200
    app.unload("unusual")


def test_an_adapter_of_another_shape(app, tmp_path_factory):
    from tests.factories import make_model

    other = make_model(tmp_path_factory.mktemp("other"), hidden_size=32, head_dim=8)
    path = make_random_adapter(app.extra_dir / "other", other)
    assert "q_proj" in error_of(app.load("other", path), 400)["message"]


@pytest.mark.parametrize("path", ["/etc", "/", "{extra}/../../..", "{extra}/link"])
def test_paths_outside_the_roots(app, path):
    link = app.extra_dir / "link"
    if not link.is_symlink():
        link.symlink_to("/etc")
    path = path.format(extra=app.extra_dir)
    assert error_of(app.load("outside", path), 403)["type"] == "PermissionDeniedError"


def test_load_replace_and_unload(app):
    def text():
        return app.complete("mine", max_tokens=20).json()["choices"][0]["text"]

    first = make_random_adapter(app.extra_dir / "first", app.model, seed=101, scale=0.4)
    second = make_random_adapter(app.extra_dir / "second", app.model, seed=102, scale=0.4)
    assert app.load("mine", first).status_code == 200
    old = text()
    assert "loaded already" in error_of(app.load("mine", second), 400)["message"]
    assert text() == old
    assert app.load("mine", second, replace=True).status_code == 200
    assert text() != old
    # A damaged successor is refused and the old version still serves.
    new = text()
    damaged = shutil.copytree(second, app.extra_dir / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"\x10")
    error_of(app.load("mine", damaged, replace=True), 400)
    assert text() == new
    assert app.unload("mine").status_code == 200
    error_of(app.complete("mine"), 404)
    assert error_of(app.unload("mine"), 404)["param"] == "lora_name"


def test_a_running_request_outlives_the_unload_of_its_adapter(app):
    path = make_random_adapter(app.extra_dir / "leaving", app.model, seed=103)
    resident = app.resident()
    assert app.load("leaving", path).status_code == 200
    with app.stream("leaving", max_tokens=1000) as response:
        lines = response.iter_lines()
        next(lines)
        [adapter_id] = app.resident() - resident
        assert app.unload("leaving").status_code == 200
        error_of(app.complete("leaving"), 404)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    # Its pages are freed, not left as a cache.
    wait_until(lambda: adapter_id not in app.resident(), timeout_s=5)


def test_a_busy_adapter_outlives_its_store(app):
    """Its lease never goes back, while the engine maps the new store's memory for others."""
    hot, *others = ADAPTERS
    stop = threading.Event()
    statuses = set()

    def ask(max_tokens):
        while not stop.is_set():
            answer = app.complete(hot, max_tokens=max_tokens, ignore_eos=True)
            statuses.add(answer.status_code)

    with ThreadPoolExecutor(SPILL_QUEUE_LEN - 1) as pool:
        # Of different lengths, so that they never all end at once.
        for max_tokens in (310, 530, 970):
            pool.submit(ask, max_tokens)
        try:
            wait_until(lambda: sum(stats["num_running"] for stats in app.stats()) > 1, timeout_s=10)
            kill_named_actor("adapter-store:slora:")
            for name in [*others, hot]:
                statuses.add(app.complete(name, max_tokens=1).status_code)
        finally:
            stop.set()
    assert statuses == {200}


def test_registered_means_served(app):
    """Also without the folder, after the store has died; only what nothing has is a 503."""

    def packed():
        return set((app.extra_dir.parent / "packed").glob("*/*.packed"))

    path = make_random_adapter(app.extra_dir / "kept", app.model, seed=104, scale=0.4)
    before = packed()
    assert app.load("kept", path).status_code == 200
    text = app.complete("kept").json()["choices"][0]["text"]
    wait_until(lambda: packed() - before, timeout_s=30)
    moved = path.rename(path.with_name("elsewhere"))
    _end_store()
    answer = app.complete("kept")
    assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, text)

    _end_store()
    # Before the next one, which takes a second to start, can read it.
    [file] = packed() - before
    file.unlink()
    answer = app.complete("kept")
    assert "'kept'" in error_of(answer, 503)["message"] and answer.headers["Retry-After"]
    moved.rename(path)
    assert app.complete("kept").json()["choices"][0]["text"] == text
    assert app.unload("kept").status_code == 200


def _end_store():
    """Kill the node's store for good; the next one starts in a second or two."""
    import ray

    [actor] = [
        actor
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith("adapter-store:slora:")
    ]
    pid = ray.get(ray.get_actor(**actor).pid.remote(), timeout=30)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not _is_running(pid), timeout_s=5)


def test_load_while_serving(app):
    """Adapters come and go while others are asked; nobody sees an error."""
    paths = [
        make_random_adapter(app.extra_dir / f"churn-{i}", app.model, seed=200 + i) for i in range(3)
    ]
    stop = threading.Event()
    statuses = set()

    def ask(name):
        while not stop.is_set():
            statuses.add(app.complete(name).status_code)

    with ThreadPoolExecutor(4) as pool:
        for name in ADAPTERS[:4]:
            pool.submit(ask, name)
        for round_number in range(4):
            for index, path in enumerate(paths):
                assert app.load(f"churn-{index}", path, replace=True).status_code == 200
                assert app.complete(f"churn-{index}").status_code == 200
            if round_number % 2:
                for index in range(len(paths)):
                    assert app.unload(f"churn-{index}").status_code == 200
        stop.set()
    assert statuses == {200}


@pytest.mark.parametrize(
    ("victim", "end"),
    [
        ("engine_pid", signal.SIGKILL),
        ("engine_pid", signal.SIGSEGV),
        ("replica_pid", signal.SIGKILL),
        # It hangs: it neither computes nor ends.
        ("engine_pid", signal.SIGSTOP),
    ],
)
def test_a_dead_or_hung_process_costs_its_requests_a_pause(app, victim, end):
    """Streams and whole answers, greedy and sampled, go on in the other replica as they were."""
    fields = {"max_tokens": 400, "ignore_eos": True, "seed": 7}
    asked = [
        (name, {**fields, "temperature": temperature, "stream": stream})
        for name in (BASE, *ADAPTERS[:3])
        for temperature in (0.0, 0.9)
        for stream in (True, False)
    ]
    expected = [_text(app.complete(name, **values)) for name, values in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = [pool.submit(app.complete, name, **values) for name, values in asked]
        wait_until(lambda: all(stats["num_running"] > 4 for stats in app.stats()), timeout_s=10)
        busy = app.stats()[0]
        os.kill(busy[victim], end)
        assert [_text(answer.result()) for answer in answers] == expected
    # The other replica takes over at once: nobody who comes later sees the death.
    for name in [BASE, *ADAPTERS]:
        assert app.complete(name, max_tokens=1).status_code == 200
    wait_until(lambda: not _is_running(busy["engine_pid"]), timeout_s=5)
    app.wait_replicas(NUM_REPLICAS)
    assert busy["engine_pid"] not in [stats["engine_pid"] for stats in app.stats()]
    for name in [BASE, *ADAPTERS]:
        assert app.complete(name, max_tokens=1).status_code == 200


def _text(answer):
    """The text of a completion, whole or streamed, which must have come to its end."""
    assert answer.status_code == 200
    if answer.headers["content-type"] == "application/json":
        events = [answer.json()]
    else:
        lines = [line for line in answer.text.splitlines() if line and not line.startswith(":")]
        assert lines.pop() == "data: [DONE]", lines[-1]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
    choices = [event["choices"][0] for event in events]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    return "".join(choice["text"] for choice in choices)


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
