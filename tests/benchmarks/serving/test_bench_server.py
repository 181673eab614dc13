"""The benchmark of the server counts right, and compares every text before it reports."""

import asyncio
import json
import os
from argparse import Namespace
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from benchmarks.serving import bench_server, stub_load
from benchmarks.serving.process_usage import Usage
from benchmarks.serving.stub_load import Checker, WrongTextError, first_length, make_prompts
from slora_core.text.tokenizer import Tokenizer
from tests.factories import make_model
from tests.tiny_tokenizer import VOCAB_SIZE, make_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "model"
    make_model(path, vocab_size=VOCAB_SIZE)
    return make_tokenizer(path)


@pytest.fixture
def tokenizer(model_dir, monkeypatch):
    monkeypatch.setattr(stub_load, "ensure_demo_model", lambda: model_dir)
    return Tokenizer(model_dir)


class FakeServer:
    """Streams what a stubbed engine would say to the prompts, a few tokens an event."""

    def __init__(self, tokenizer, prompts, is_wrong=False):
        self._tokenizer = tokenizer
        self._prompts = {prompt.content: prompt for prompt in prompts}
        self._is_wrong = is_wrong

    @contextmanager
    def running(self):
        with asyncio.Runner() as runner:
            server = runner.run(asyncio.start_server(self._handle, "127.0.0.1", 0))
            yield runner, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            server.close()

    async def _handle(self, reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split()[0])
                body = json.loads(await reader.readexactly(length))
                self._answer(body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def _answer(self, body, writer):
        assert body["stream"] and body["temperature"] == 0
        prompt = self._prompts[body["messages"][0]["content"]]
        token_ids = prompt.token_ids[: body["max_tokens"]]
        if self._is_wrong:
            token_ids = [token_ids[0] ^ 1, *token_ids[1:]]
        decoder = self._tokenizer.decoder(prompt.prompt_ids)
        texts = [decoder.push(token_ids[i : i + 3]) for i in range(0, len(token_ids), 3)]
        choices = [{"delta": {"content": text}, "finish_reason": None} for text in texts]
        choices.append({"delta": {"content": decoder.finish()}, "finish_reason": "length"})
        events = [json.dumps({"choices": [choice]}) for choice in choices]
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for data in [*(f"data: {event}\n\n".encode() for event in events), b"data: [DONE]\n\n"]:
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        writer.write(b"0\r\n\r\n")


def measure(tokenizer, monkeypatch, is_wrong=False):
    monkeypatch.setattr(bench_server, "WARM_UP_S", 0.05)
    args = Namespace(streams=3, tokens=12, requests=5, seconds=0.1, step_ms=4.0)
    prompts = asyncio.run(make_prompts(tokenizer, args.streams, args.tokens))
    with FakeServer(tokenizer, prompts, is_wrong).running() as (runner, url):
        work = bench_server.measure(url, os.getpid(), args, prompts, Checker(tokenizer))
        return runner.run(work)


def test_figures(tokenizer, monkeypatch):
    figures = measure(tokenizer, monkeypatch)
    assert figures["engine_tokens_per_s"] == 750.0
    # Five alone, and one at least of each stream.
    assert figures["num_answers"] >= 5 + 3
    assert figures["tokens_per_s"] > 0 and figures["tokens_per_piece"] >= 1
    for cores in (figures["cores"], figures["alone_cores"]):
        assert {"client", "others"} <= cores.keys()
    # It answers at once, and a step of 4 ms is taken off.
    assert -4.0 < figures["added_ttft_ms"]["p50"] < figures["added_ttft_ms"]["p99"]


def test_a_wrong_text_is_no_report(tokenizer, monkeypatch):
    with pytest.raises(WrongTextError):
        measure(tokenizer, monkeypatch, is_wrong=True)


def test_prompts_and_answers_differ(tokenizer):
    prompts = asyncio.run(make_prompts(tokenizer, 5, 20))
    assert len({prompt.content for prompt in prompts}) == 5
    assert len({tuple(prompt.token_ids) for prompt in prompts}) == 5


def test_streams_get_out_of_step():
    assert [first_length(index, 4, 256) for index in range(4)] == [64, 128, 192, 256]
    assert first_length(0, 64, 16) == 1


def test_what_others_take(monkeypatch):
    """The machine's time less the server's and this process's own."""
    monkeypatch.setattr(bench_server, "usage_of_descendants", lambda pid: next(samples))
    monkeypatch.setattr(bench_server, "machine_cpu_s", lambda: next(machine))
    clock = SimpleNamespace(monotonic=lambda: next(times), process_time=lambda: next(own))
    monkeypatch.setattr(bench_server, "time", clock)
    samples = iter(
        [
            {1: Usage("a", 0, 0, 0, 3.0), 2: Usage("a", 0, 0, 0, 0.0)},
            {1: Usage("a", 0, 0, 0, 7.0), 2: Usage("a", 0, 0, 0, 2.0)},
        ]
    )
    machine, times, own = iter([100.0, 115.0]), iter([0.0, 10.0]), iter([1.0, 2.0])
    meter = bench_server.CoreMeter(1)
    assert meter.read() == {"others": 0.8, "a": 0.6, "client": 0.1}
    assert meter.seconds == 10.0
