"""The evaluation over HTTP, against a server that is a function."""

import asyncio
import json

import httpx
import pytest

from benchmarks.demo.demo_tasks import held_out_examples
from benchmarks.demo.eval_demo_adapters import EvaluationError, evaluate

ANSWERS = {
    example.prompt: example.answer
    for name in ("date-iso", "ticket-route")
    for example in held_out_examples(name, 20)
}
BASE = "smollm2-135m-instruct"


def answer(request: httpx.Request) -> httpx.Response:
    if request.url.path == "/v1/models":
        cards = [{"id": name} for name in (BASE, "date-iso", "ticket-route")]
        return httpx.Response(200, json={"data": cards})
    body = json.loads(request.content)
    assert body["temperature"] == 0
    assert body["max_tokens"] > 0
    text = ANSWERS[body["messages"][0]["content"]]
    if body["model"] == BASE:
        text = "I do not know."
    choice = {"message": {"role": "assistant", "content": text}}
    return httpx.Response(200, json={"choices": [choice], "usage": {"completion_tokens": 5}})


def run(handler, task_names: list[str]) -> list[dict]:
    async def main() -> list[dict]:
        transport = httpx.MockTransport(handler)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await evaluate(client, task_names, BASE, examples_per_task=20, concurrency=4)

    return asyncio.run(main())


def test_counts_right_answers_of_base_and_adapter():
    rows = run(answer, ["date-iso", "ticket-route"])
    assert [row["task"] for row in rows] == ["date-iso", "ticket-route"]
    for row in rows:
        assert row["base_accuracy"] == 0.0
        assert row["adapter_accuracy"] == 1.0
        assert row["num_held_out"] == 20
        assert row["adapter_tokens"] == 100


def test_missing_adapter_is_named():
    with pytest.raises(EvaluationError, match="does not serve: order-json"):
        run(answer, ["order-json"])


def test_an_error_from_the_server_ends_the_run_with_its_words():
    def fail(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(503, text="pool is full")
        return answer(request)

    with pytest.raises(EvaluationError, match="HTTP 503: pool is full"):
        run(fail, ["date-iso"])


def test_no_server():
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(EvaluationError, match="no model list from http://server"):
        run(refuse, ["date-iso"])
