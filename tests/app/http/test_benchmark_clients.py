"""What benchmark clients of others send, recorded from guidellm 0.8.1 and aiperf 0.13.0.

The texts are cut short; every field is as it came, several adapters at once.
"""

import asyncio
import json

import pytest

from slora_core.text.tokenizer import Tokenizer
from tests.app.http.test_routes import Server, events_of
from tests.tiny_tokenizer import make_tokenizer

WITH_USAGE = {"include_usage": True}
WITH_CONTINUOUS_USAGE = {"include_usage": True, "continuous_usage_stats": True}
# By command: the path, and a body for each adapter.
RECORDED = {
    "guidellm run --backend kind=openai_http,model=...": (
        "/v1/chat/completions",
        {
            "stream": True,
            "stream_options": WITH_CONTINUOUS_USAGE,
            "max_completion_tokens": 8,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "1 0 m0 Fin"}]}],
        },
    ),
    "guidellm run --backend kind=openai_http,request_format=/v1/completions,model=...": (
        "/v1/completions",
        {
            "stream": True,
            "stream_options": WITH_CONTINUOUS_USAGE,
            "max_tokens": 8,
            "ignore_eos": True,
            "prompt": "1 0 m0 Finish medical want",
        },
    ),
    "aiperf profile --endpoint-type chat --streaming": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": " chamber window"}],
            "stream": True,
            "max_completion_tokens": 8,
            "stream_options": WITH_USAGE,
        },
    ),
    "aiperf profile --endpoint-type chat --streaming --per-chunk-usage --extra-inputs {...}": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": " is no hope int"}],
            "stream": True,
            "max_completion_tokens": 8,
            "chat_template_kwargs": {"enable_thinking": False},
            "stream_options": WITH_CONTINUOUS_USAGE,
        },
    ),
    "aiperf profile --endpoint-type chat --use-legacy-max-tokens --extra-inputs temperature:0": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "z Can you love"}],
            "stream": False,
            "max_tokens": 8,
            "temperature": 0,
        },
    ),
    "aiperf profile --endpoint-type completions --streaming --extra-inputs min_tokens:8": (
        "/v1/completions",
        {
            "prompt": " charge it against me",
            "stream": True,
            "max_tokens": 8,
            "ignore_eos": True,
            "min_tokens": 8,
            "stream_options": WITH_USAGE,
        },
    ),
}


@pytest.fixture
def server(tmp_path):
    return Server(Tokenizer(make_tokenizer(tmp_path)))


@pytest.mark.parametrize("command", RECORDED)
def test_several_adapters_at_once(server, command):
    path, body = RECORDED[command]
    adapters = ["sql", "json"]

    async def work(client):
        posts = [client.post(path, json={"model": adapter, **body}) for adapter in adapters]
        return await asyncio.gather(*posts)

    responses = server.call(work)
    assert [response.status_code for response in responses] == [200, 200]
    adapter_ids = {request.adapter_id for request in server.engine.requests}
    assert adapter_ids == {"sql-v1", "json-v1"}
    for adapter, response in zip(adapters, responses, strict=True):
        answers = events_of(response) if body["stream"] else [response.json()]
        assert {answer["model"] for answer in answers} == {adapter}
        usages = [answer.get("usage") for answer in answers]
        is_continuous = body.get("stream_options") == WITH_CONTINUOUS_USAGE
        assert all(usages) if is_continuous else not any(usages[:-1])
        assert usages[-1]["completion_tokens"] == 11


def test_before_and_between_requests(server):
    assert json.loads(server.get("/health").content) == {"status": "ok"}
    assert server.get("/v1/models").json()["data"][0]["id"] == "base"
    # aiperf asks for metrics and goes on without.
    assert server.get("/metrics").status_code == 404
