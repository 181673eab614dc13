"""The command pairs as a user runs them, from their own folders; nothing is left when they end."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from benchmarks.demo.demo_tasks import TASKS
from tests.conftest import free_port

pytestmark = [pytest.mark.serve, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
# In the environment of a server and all that it starts, so that they can be told from others.
MARK = "SLORA_E2E_SERVER"
START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 60
CLIENT_TIMEOUT_S = 240
# Eight requests.
LOAD = ("--rate", "2", "--duration", "4")


def marked_processes(mark):
    """Command lines by process id."""
    found = {}
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in environ.read_bytes().split(b"\0"):
                command = (environ.parent / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(environ.parent.name)] = command.decode(errors="replace")[:100]
        except OSError:
            continue
    return found


def wait_for(condition, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not (result := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return result


@contextmanager
def server(folder, log_path, *options):
    """`python launch_server.py` in a folder, stopped as Ctrl-C in a terminal does it."""
    port, mark = free_port(), uuid.uuid4().hex
    command = [sys.executable, "launch_server.py", "--port", str(port), *options]
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT / folder,
            env={**os.environ, MARK: mark},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:

        def is_up():
            return "\nready: " in log_path.read_text() or process.poll() is not None

        assert wait_for(is_up, START_TIMEOUT_S) and process.poll() is None, log_path.read_text()
        yield f"http://127.0.0.1:{port}"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(STOP_TIMEOUT_S) == 0, log_path.read_text()
        assert wait_for(lambda: not marked_processes(mark), 10), marked_processes(mark)
    finally:
        for pid in marked_processes(mark):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def run_client(folder, url, *options):
    """`python run_exp.py` in a folder; its last line's JSON."""
    client = subprocess.run(
        [sys.executable, "run_exp.py", "--url", url, *options],
        cwd=ROOT / folder,
        capture_output=True,
        text=True,
        timeout=CLIENT_TIMEOUT_S,
    )
    assert client.returncode == 0, client.stdout + client.stderr
    return json.loads(client.stdout.splitlines()[-1])


def scratch_of(url):
    """The folder that the server made for its adapters."""
    cards = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]
    return Path(cards[-1]["root"]).parents[1]


def load_by_plain_names(url):
    """Also serve each task's adapter under the name that the checking client asks for."""
    for task in TASKS:
        body = {"lora_name": task, "lora_path": f"{task}-0"}
        answer = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text


def check_answers(url):
    """Two examples a task, one of them streamed."""
    load_by_plain_names(url)
    result = run_client("tests/e2e", url, "--examples", "2", "--base-examples", "1")
    assert result["num_answered"] == result["num_questions"] == 15
    assert all(shares == {"adapter": 1.0, "base": 0.0} for shares in result["accuracy"].values())


@pytest.mark.parametrize("dummy", [[], ["--dummy"]], ids=["real", "dummy"])
def test_the_commands_of_s_lora(dummy, tmp_path):
    """Beside the load, the answers of the real weights; the checking client shares the server."""
    setting = ["--model-setting", "Real", *dummy]
    sizes = ["--num-adapter", "100", "--num-token", "10000"]
    with server("benchmarks", tmp_path / "log", *sizes, *setting) as url:
        result = run_client("benchmarks", url, "--debug", *LOAD, *setting)
        scratch = scratch_of(url)
        assert scratch.is_dir()
        if not dummy:
            check_answers(url)
    assert not scratch.exists()
    assert result["config"]["num_adapters_served"] == 100
    assert result["num_requests"] == result["num_answered"] == 8
    assert result["num_aborted"] == result["num_errors"] == 0
    assert result["num_models"] > 4
    assert result["num_output_tokens"] >= 8 * 8
    assert result["ttft_s"]["p50"] > 0 and result["inter_token_s"]["p50"] > 0


def test_a_client_without_its_server_says_so():
    client = subprocess.run(
        [sys.executable, "run_exp.py", "--url", f"http://127.0.0.1:{free_port()}"],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert client.returncode == 2
    assert "launch_server.py" in client.stderr


@pytest.fixture
def short_tmp_path():
    """Pytest's own is too long for the sockets that Ray keeps under TMPDIR."""
    with tempfile.TemporaryDirectory(prefix="e2e-") as path:
        yield Path(path)


@pytest.mark.parametrize(
    ("folder", "stage"),
    [("benchmarks", "starting Ray"), ("tests/e2e", "starting the application")],
)
def test_a_start_that_is_interrupted_leaves_nothing(folder, stage, short_tmp_path):
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "launch_server.py", "--port", str(free_port())],
        cwd=ROOT / folder,
        env={**os.environ, MARK: mark, "TMPDIR": str(short_tmp_path)},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if line == f"{stage}\n":
                break
        else:
            pytest.fail("".join(said))
        is_scratch_made = bool(list(short_tmp_path.glob("slora-bench-*")))
        assert is_scratch_made == (folder == "benchmarks")
        os.killpg(process.pid, signal.SIGINT)
        said.append(process.communicate(timeout=STOP_TIMEOUT_S)[1])
        assert "ready: " not in said[-1]
        assert wait_for(lambda: not marked_processes(mark), 10), marked_processes(mark)
        assert list(short_tmp_path.glob("slora-bench-*")) == []
    finally:
        for pid in marked_processes(mark):
            os.kill(pid, signal.SIGKILL)
        process.wait()
