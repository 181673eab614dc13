"""Fixtures that several test modules share, and what the whole run reports."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Torch's threads else spin while they wait for each other: a third busy process on two cores then
# makes everything ten times slower. Read when torch is imported, which nobody has yet.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Without a GPU, Triton kernels run in Triton's interpreter; read when triton is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray cluster of four counted CPUs with Serve on a free port; yields the base URL."""
    import ray
    from ray import serve

    # Ray's workers import the packages from here, installed or not.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    port = _free_port()
    ray.init(
        # Never a cluster that happens to run on this machine.
        address="local",
        num_cpus=4,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch in one thread: tiny tensors gain nothing from two, which wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter) -> None:
    oracle = sys.modules.get("tests.oracle")
    if oracle is not None and oracle.comparisons.num_compared:
        terminalreporter.write_line(
            f"greedy texts: {oracle.comparisons.num_compared} compared, of which the near-tie "
            f"clause forgave {oracle.comparisons.num_forgiven}"
        )


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
