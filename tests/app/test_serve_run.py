"""A start that fails ends the user's `serve run` with one line and a status."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from app import serve_run
from app.build import build
from app.ray_private import ServeRun
from app.serve_run import MAX_LINE_CHARS, as_line, ended_by_failure
from slora_core.errors import UnsupportedModelError
from tests.app.serve_app import make_tiny_model, wait_until
from tests.conftest import ROOT, free_port

START_TIMEOUT_S = 120


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("num_replicas: 1\nis   wrong"), "num_replicas: 1 is wrong"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (UnsupportedModelError("the model"), "the model"),
        (KeyError("weights"), "KeyError: 'weights'"),
        (ValueError(""), "ValueError: "),
    ],
)
def test_the_line(error, line):
    assert as_line(error) == line


def test_a_long_line_is_cut():
    assert len(as_line(ValueError("a" * 10_000))) == MAX_LINE_CHARS


@pytest.fixture
def process():
    """Stands for `serve run`: waits, and leaves SIGINT to its default."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_failure_ends_the_process_that_waits_for_the_start(process, monkeypatch, capfd):
    waiting = ServeRun("01", process.pid, owns_cluster=True)
    monkeypatch.setattr(serve_run, "_waiting_serve_run", lambda: waiting)
    monkeypatch.setattr(serve_run, "LOG_DELAY_S", 0.0)
    monkeypatch.setattr(serve_run, "SIGNALS", ((signal.SIGKILL, 0.0),))
    with pytest.raises(ValueError, match="nonsense"):
        build({"nonsense": 1})
    assert process.wait(10) == -signal.SIGKILL
    assert capfd.readouterr().err == (
        "the start failed: nonsense is no argument of this application\n"
    )


def test_a_defect_is_told_with_its_traceback(process, monkeypatch, capfd):
    waiting = ServeRun("01", process.pid, owns_cluster=True)
    monkeypatch.setattr(serve_run, "_waiting_serve_run", lambda: waiting)
    monkeypatch.setattr(serve_run, "LOG_DELAY_S", 0.0)
    monkeypatch.setattr(serve_run, "SIGNALS", ((signal.SIGKILL, 0.0),))
    with pytest.raises(AttributeError), ended_by_failure():
        raise AttributeError("weights")
    assert process.wait(10) == -signal.SIGKILL
    written = capfd.readouterr().err
    assert written.startswith("Traceback")
    assert written.endswith("the start failed: AttributeError: weights\n")


def test_where_no_serve_run_waits_the_error_is_all(capfd):
    with pytest.raises(ValueError, match="num_replicas: Input should be .*, not 0"):
        build({"num_replicas": 0})
    assert capfd.readouterr().err == ""


@contextmanager
def serve_run_of(folder: Path, port: int, **args) -> Iterator[subprocess.Popen]:
    """`serve run` of a config file, as in a terminal; what it writes goes into `log`."""
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {"name": "slora", "route_prefix": "/", "import_path": "app.build:build", "args": args}
        ],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", str(path)],
            cwd=ROOT,
            # Never a cluster that happens to run on this machine.
            env={**os.environ, "RAY_ADDRESS": "local"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # As in a terminal, also where the tests themselves run in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def reasons(folder: Path) -> list[str]:
    lines = (folder / "log").read_text().splitlines()
    return [line for line in lines if "the start failed: " in line]


@pytest.mark.serve
@pytest.mark.slow
def test_weights_that_are_damaged(tmp_path):
    """A replica is the first that can know."""
    model = make_tiny_model(tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with serve_run_of(tmp_path, free_port(), model=str(model), num_pool_tokens=1024) as process:
        assert process.wait(START_TIMEOUT_S) != 0
    [told] = reasons(tmp_path)
    assert f"{weights} is damaged" in told


@pytest.mark.serve
@pytest.mark.slow
def test_two_servers_on_one_port(ray_cluster, tmp_path):
    """The second ends, and the first is not disturbed."""
    port = int(ray_cluster.rpartition(":")[2])
    with serve_run_of(tmp_path, port, model=str(tmp_path)) as process:
        assert process.wait(START_TIMEOUT_S) != 0
    [told] = reasons(tmp_path)
    assert f"http_options: port {port} of 127.0.0.1 is taken by process " in told


@pytest.mark.serve
@pytest.mark.slow
def test_at_an_interrupt_streams_end_with_an_event(tmp_path):
    """Ctrl-C reaches the whole group of processes, of which Serve's proxies are the first to go."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 2000, "ignore_eos": True}
    whole = []
    args = {"model": str(make_tiny_model(tmp_path)), "served_model_name": "tiny"}
    with serve_run_of(tmp_path, port, num_pool_tokens=8192, **args) as process:
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200, START_TIMEOUT_S)
        asking = threading.Thread(
            target=lambda: whole.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))
        )
        asking.start()
        request = httpx.stream(
            "POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=60
        )
        with request as stream:
            lines = stream.iter_lines()
            next(lines)
            os.killpg(process.pid, signal.SIGINT)
            events = [line for line in lines if line]
        asking.join()
        assert process.wait(60) == 0
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == 503
    assert whole[0].status_code == 503
    assert "being stopped" in events[-1] and "being stopped" in whole[0].text
    assert "Traceback" not in (tmp_path / "log").read_text()
