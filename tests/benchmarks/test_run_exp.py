"""The client command: what it sends, what it refuses, how it exits."""

import http.server
import json
import threading
from contextlib import contextmanager

import pytest

from benchmarks import launch_server
from benchmarks.run_exp import (
    Progress,
    WrongServerError,
    parse_args,
    plan,
    row,
    served_adapters,
    trace_config,
)
from benchmarks.serving.load_generator import RequestRecord
from benchmarks.serving.settings import SETTINGS
from benchmarks.serving.trace import make_trace

REAL = SETTINGS["Real"]


@contextmanager
def models_server(status, body):
    """A server whose every GET answers so."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def cards(base, adapters):
    data = [{"id": base}, *({"id": name, "parent": base} for name in adapters)]
    return json.dumps({"object": "list", "data": data}).encode()


def test_adapters_of_the_right_server():
    body = cards(REAL.served_name(False), ["a-0", "a-1", "b-0", "b-1"])
    with models_server(200, body) as url:
        assert served_adapters(url, REAL, dummy=False) == ["a-0", "b-0", "a-1", "b-1"]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, cards("llama-7b-s1-dummy", []), "serves llama-7b-s1-dummy"),
        (200, b"<html>", "not a server of the OpenAI API"),
        (200, b'{"data": 3}', "not a server of the OpenAI API"),
        (404, b"", "launch_server.py"),
    ],
)
def test_the_wrong_server(status, body, words):
    with models_server(status, body) as url, pytest.raises(WrongServerError, match=words):
        served_adapters(url, REAL, dummy=False)


def test_nobody_answers():
    with pytest.raises(WrongServerError, match="launch_server.py"):
        served_adapters("http://127.0.0.1:9", REAL, dummy=False)


def test_dummies_are_not_taken_for_real_weights():
    with models_server(200, cards(REAL.served_name(False), [])) as url:
        assert served_adapters(url, REAL, dummy=False) == []
        with pytest.raises(WrongServerError, match="--dummy"):
            served_adapters(url, REAL, dummy=True)


def test_requests_are_those_of_the_trace():
    args = parse_args(["--debug", "--duration", "20", "--seed", "1"])
    config = trace_config(args, 3)
    trace = make_trace(config)
    requests = plan(trace, "base", ["x", "y", "z"])
    assert len(requests) == 20
    for request, planned in zip(trace, requests, strict=True):
        body = planned.body
        assert planned.due_s == request.due_s
        assert body["model"] == ["x", "y", "z"][request.adapter]
        assert (body["prompt"], body["max_tokens"]) == (
            list(request.prompt_ids),
            request.output_len,
        )
        assert body["ignore_eos"] is True


def test_without_adapters_the_base_is_asked():
    config = trace_config(parse_args(["--num-adapter", "0", "--debug"]), 3)
    assert {request.body["model"] for request in plan(make_trace(config), "base", [])} == {"base"}


def test_more_adapters_than_served():
    with pytest.raises(WrongServerError, match="3 are served"):
        trace_config(parse_args(["--num-adapter", "4"]), 3)


@pytest.mark.parametrize("option", ["--rate", "--duration", "--alpha", "--cv"])
def test_wrong_values_are_named(option):
    with pytest.raises(ValueError, match=option[2:]):
        trace_config(parse_args([option, "-1"]), 3)


def test_row_and_progress():
    record = RequestRecord(0, "x", 0.0, sent_s=0.1)
    with Progress(2) as progress:
        progress.show(record)
        record.end_s = 0.4
        record.num_output_tokens = 5
        progress.show(record)
        failed = RequestRecord(1, "y", 0.0, end_s=0.5, error="timeout")
        progress.show(failed)
    args = parse_args(["--debug"])
    result = row(args, trace_config(args, 3), 3, [record, failed])
    assert (result["num_answered"], result["num_errors"]) == (1, 1)
    assert result["seed"] == result["config"]["trace"]["seed"] == 42
    json.dumps(result, allow_nan=False)


def test_settings_without_weights_want_dummy(capsys):
    with pytest.raises(SystemExit):
        launch_server.parse_args(["--model-setting", "S1"])
    assert "--dummy" in capsys.readouterr().err
    assert launch_server.parse_args(["--model-setting", "S1", "--dummy"]).num_adapter == 100


@pytest.mark.parametrize("dummy", [True, False])
def test_server_arguments(tmp_path, dummy, monkeypatch):
    if not dummy:
        # No download in this test: the demo model's config is that of the setting.
        from benchmarks.serving.server_files import make_dummy_model

        model = make_dummy_model(REAL.hf_config, tmp_path / "real")
        monkeypatch.setattr("app.models.source.ensure_demo_model", lambda: model)
    options = ["--num-adapter", "7", "--num-token", "10000", *(["--dummy"] if dummy else [])]
    args = launch_server.server_args(launch_server.parse_args(options), tmp_path)
    assert args.num_pool_tokens == 10000
    assert args.base_model_name == REAL.served_name(dummy)
    assert len(list((tmp_path / "adapters").iterdir())) == 7
    assert (args.load_format == "dummy") == dummy


def test_the_store_holds_every_adapter_where_the_memory_allows(tmp_path, monkeypatch, capsys):
    options = ["--num-adapter", "100", "--dummy"]
    args = launch_server.server_args(launch_server.parse_args(options), tmp_path)
    needed = 10 * args.store_capacity_bytes
    assert launch_server._store_bytes(0, args) >= args.store_capacity_bytes
    monkeypatch.setattr("os.sysconf", lambda name: 2**15 if "PAGES" in name else 2**20)
    assert launch_server._store_bytes(needed, args) >= needed
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    assert launch_server._store_bytes(needed, args) == args.store_capacity_bytes
    assert "GiB of adapters" in capsys.readouterr().err
