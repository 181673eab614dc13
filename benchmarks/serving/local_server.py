"""Runs the Serve application in a Ray cluster of its own until it is told to stop.

Owns the cluster's life. What is served are the arguments of serve_configs/slora.yaml with the
caller's changes; `launch_server.py` here and in tests/e2e call it, and the soak.
"""

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from app.args import SLoRAArgs
from benchmarks.report import ROOT

HOST = "127.0.0.1"
APP_NAME = "slora"
READY_TIMEOUT_S = 120.0
# What the application's other actors count beside its replicas.
OTHER_CPUS = 1.0


class ServerError(RuntimeError):
    """The server cannot start, or does not serve what it should."""


def config_args(**changes: Any) -> SLoRAArgs:
    """The arguments in serve_configs/slora.yaml, changed."""
    import yaml

    config = yaml.safe_load((ROOT / "serve_configs" / "slora.yaml").read_text())
    args = {**config["applications"][0]["args"], **changes}
    # Relative to the repository there.
    args["adapters_dir"] = str(ROOT / args["adapters_dir"])
    return SLoRAArgs(**args)


def stop_on_signals() -> None:
    """Have SIGINT and SIGTERM raise KeyboardInterrupt, so that everything made is removed."""
    # SIGINT too: a shell starts background commands with it ignored, which Python then keeps.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def serve_until_stopped(args: SLoRAArgs, port: int) -> None:
    """Serve on `port` until SIGINT or SIGTERM; stdout gets one line when ready.

    Raises:
        ServerError: the port is taken, or not every adapter of `adapters_dir` is served.
    """
    try:
        with local_server(args, port) as (url, num_adapters):
            base = args.base_model_name
            print(f"ready: {url} serves {base} and {num_adapters} adapters", flush=True)
            # Until a signal interrupts it.
            threading.Event().wait()
    except KeyboardInterrupt:
        say("stopping")


@contextmanager
def local_server(args: SLoRAArgs, port: int) -> Iterator[tuple[str, int]]:
    """Serve on `port`; yields the URL and the number of adapters once they are served.

    Signals raise KeyboardInterrupt from here on; all is stopped at the end, however it comes.

    Raises:
        ServerError: the port is taken, or not every adapter of `adapters_dir` is served.
    """
    _check_port(port)
    # Ray's workers import the packages from here, installed or not.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    import ray
    from ray import serve

    num_cpus = math.ceil(args.num_replicas * args.cpus_per_replica + OTHER_CPUS)
    try:
        say("starting Ray")
        ray.init(
            # Never a cluster that happens to run on this machine.
            address="local",
            num_cpus=max(num_cpus, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        # Ray has put a handler of its own in place.
        stop_on_signals()
        serve.start(http_options={"host": HOST, "port": port}, proxy_location="HeadOnly")
        say("starting the application")
        _start(args)
        url = f"http://{HOST}:{port}"
        yield url, _wait_ready(url, args)
    finally:
        # A second Ctrl-C must not leave half of it running.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _start(args: SLoRAArgs) -> None:
    from ray import serve

    from app.build import application

    serve.run(application(args), name=APP_NAME, route_prefix="/")


def _wait_ready(url: str, args: SLoRAArgs) -> int:
    """Wait for /health, then count the adapters that /v1/models has."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    with httpx.Client(base_url=url, timeout=10.0, trust_env=False) as client:
        while True:
            try:
                if client.get("/health").status_code == 200:
                    break
            except httpx.TransportError as error:
                say(f"not there yet: {error!r}")
            if time.monotonic() > deadline:
                raise ServerError(f"{url}/health is not well within {READY_TIMEOUT_S:g} s")
            time.sleep(0.3)
        names = {card["id"] for card in client.get("/v1/models").json()["data"]}
    wanted = {path.parent.name for path in Path(args.adapters_dir or "").glob("*/*config.json")}
    missing = sorted(wanted - names)
    if missing:
        raise ServerError(
            f"{len(missing)} of {len(wanted)} adapters are refused, {missing[0]} for one; "
            "Serve's log of the registry says why"
        )
    return len(wanted)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerError(f"port {port} of {HOST}: {error.strerror}; give --port") from None


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
