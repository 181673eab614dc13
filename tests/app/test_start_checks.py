"""What is checked of the machine before anything starts."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from app.args import SLoRAArgs
from app.start_checks import check_gpus, check_port


def test_more_gpus_than_the_machine_has():
    args = SLoRAArgs(device="cuda", gpus_per_replica=1, num_replicas=2)
    check_gpus(args, 2)
    with pytest.raises(ValueError, match="2 of gpus_per_replica 1 need 2 GPUs; .* has 0"):
        check_gpus(args, 0)
    check_gpus(SLoRAArgs(), 0)


@contextmanager
def listening(host):
    """A server of this process on a port that others may share, as Serve's proxies listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind((host, 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def other_cluster(monkeypatch):
    """This process counts as one outside the cluster of whoever checks."""
    raylet = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(os, "getppid", lambda: raylet.pid)
    yield
    raylet.communicate(b"\n")


@pytest.mark.parametrize(
    ("host", "asked"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "localhost"),
        ("127.0.0.1", "0.0.0.0"),
        ("127.0.0.1", "::"),
        ("0.0.0.0", "127.0.0.1"),
    ],
)
def test_a_port_that_another_server_listens_on(other_cluster, host, asked):
    with (
        listening(host) as port,
        pytest.raises(
            ValueError, match=f"port {port} of {asked} is taken by process {os.getpid()};"
        ),
    ):
        check_port(asked, port)


def test_a_port_of_another_address_or_of_nobody(other_cluster):
    with listening("127.0.0.2") as port:
        check_port("127.0.0.1", port)
        check_port("::1", port)
    check_port("127.0.0.1", port)


def test_the_clusters_own_proxy_is_no_other_server(monkeypatch):
    """As a redeployment meets it; the test's own process stands for the raylet."""
    monkeypatch.setattr(os, "getppid", os.getpid)
    server = (
        "import socket, sys\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "print(server.getsockname()[1], flush=True)\n"
        "input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", server], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as proxy:
        check_port("127.0.0.1", int(proxy.stdout.readline()))
        proxy.communicate("\n")
