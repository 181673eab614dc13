"""`serve run` of a config as an operator starts it, with Serve's switches in its environment.

Owns the process and whatever it has started. `local_server` serves within this process instead,
where Serve has read the environment already.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.report import ROOT
from benchmarks.serving.local_server import HOST, READY_TIMEOUT_S, ServerError
from benchmarks.serving.process_usage import is_running, usage_of_descendants

COMMAND = (sys.executable, "-m", "ray.serve.scripts", "run")
STOP_TIMEOUT_S = 60.0
# How long the processes of a server that has ended may take to follow it.
FOLLOW_TIMEOUT_S = 10.0


@contextmanager
def serve_run(
    import_path: str, args: Mapping[str, Any], port: int, environment: Mapping[str, str]
) -> Iterator[tuple[str, int]]:
    """Yields the URL and the process id of a `serve run` once /health is well.

    Raises:
        ServerError: it ended, or was not well in time; with the end of what it wrote.
    """
    import yaml

    url = f"http://{HOST}:{port}"
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": HOST, "port": port},
        "applications": [
            {
                "name": "slora",
                "route_prefix": "/",
                "import_path": import_path,
                "args": dict(args),
            }
        ],
    }
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        log_path = Path(directory) / "log"
        with log_path.open("w") as log:
            process = subprocess.Popen(
                [*COMMAND, str(path)],
                cwd=ROOT,
                # Never a cluster that happens to run on this machine.
                env={**os.environ, "RAY_ADDRESS": "local", **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell starts background commands with it ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            try:
                _wait_well(url, process, log_path)
                yield url, process.pid
            finally:
                _stop(process)


def _wait_well(url: str, process: "subprocess.Popen[bytes]", log_path: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    with httpx.Client(base_url=url, timeout=10.0, trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if client.get("/health").status_code == 200:
                    return
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"{url}/health is not well: ...{log_path.read_text()[-3000:]}")
            time.sleep(0.2)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ctrl-C, and an end to what is left after it."""
    started = list(usage_of_descendants(process.pid))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGINT)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    deadline = time.monotonic() + FOLLOW_TIMEOUT_S
    while (left := [pid for pid in started if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
