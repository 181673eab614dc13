"""A server in a process of its own, its switches in the environment, nothing left of it at the end.

In place of Serve a program that takes its config and answers /health.
"""

import sys
import time

import httpx
import pytest

from benchmarks.serving import serve_process
from benchmarks.serving.local_server import ServerError
from benchmarks.serving.process_usage import is_running, usage_of_descendants
from benchmarks.serving.serve_process import serve_run
from tests.conftest import free_port

PROGRAM = """
import http.server, json, os, subprocess, sys, yaml
config = yaml.safe_load(open(sys.argv[-1]))
if config["applications"][0]["args"].get("fails"):
    sys.exit("the start failed: of itself")
# It outlives who started it.
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        seen = {"path": self.path, "switch": os.environ.get("SWITCH"), "config": config}
        self.wfile.write(json.dumps(seen).encode())

options = config["http_options"]
http.server.HTTPServer((options["host"], options["port"]), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def program(monkeypatch):
    monkeypatch.setattr(serve_process, "COMMAND", (sys.executable, "-c", PROGRAM))
    monkeypatch.setattr(serve_process, "FOLLOW_TIMEOUT_S", 0.2)


def test_it_serves_and_nothing_is_left():
    args = {"num_replicas": 2}
    with serve_run("a.b:build", args, free_port(), {"SWITCH": "on"}) as (url, pid):
        seen = httpx.get(f"{url}/health").json()
        assert (seen["path"], seen["switch"]) == ("/health", "on")
        [application] = seen["config"]["applications"]
        assert (application["import_path"], application["args"]) == ("a.b:build", args)
        deadline = time.monotonic() + 20
        while not (children := usage_of_descendants(pid)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    deadline = time.monotonic() + 20
    while any(is_running(each) for each in [pid, *children]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_start_that_fails_says_why():
    with (
        pytest.raises(ServerError, match="the start failed: of itself"),
        serve_run("a.b:build", {"fails": True}, free_port(), {}),
    ):
        pass
