"""Fixtures that several test modules share, which tests share a worker, and the run's report."""

import logging
import operator
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What a worker of pytest-xdist sends at its end, and the sums of all of them.
COMPARISONS = "comparisons"
WORKERS_COMPARISONS = pytest.StashKey[list[int]]()

# Torch's threads else spin while they wait for each other: a third busy process on two cores then
# makes everything ten times slower. Read when torch is imported, which nobody has yet.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# One core a worker. An engine in a process of its own sets its threads itself.
if IS_WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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
    port = free_port()
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


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """Undo what a Serve deployment that a test makes does to the loggers of its process."""
    yield
    for name in ("app", "slora_core"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch in one thread: tiny tensors gain nothing from two, which wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    from tests.xdist_groups import GroupScheduling

    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    for item in items:
        if "ray_cluster" in item.fixturenames and not item.get_closest_marker("serve"):
            raise pytest.UsageError(f"{item.nodeid} starts Ray; mark it with pytest.mark.serve")
    if IS_WORKER:
        from tests.xdist_groups import order_of

        items.sort(key=lambda item: order_of(item.nodeid))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker sends its counts home."""
    if IS_WORKER:
        session.config.workeroutput[COMPARISONS] = _comparisons()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    # One that crashed has none.
    counts = getattr(node, "workeroutput", {}).get(COMPARISONS, (0, 0))
    totals = node.config.stash.setdefault(WORKERS_COMPARISONS, [0, 0])
    totals[:] = map(operator.add, totals, counts)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    of_workers = config.stash.get(WORKERS_COMPARISONS, [0, 0])
    num_compared, num_forgiven = map(operator.add, _comparisons(), of_workers)
    if num_compared:
        terminalreporter.write_line(
            f"greedy texts: {num_compared} compared, of which the near-tie clause forgave "
            f"{num_forgiven}"
        )


def _comparisons() -> tuple[int, int]:
    """Greedy texts that this process compared, and how many the near-tie clause forgave."""
    oracle = sys.modules.get("tests.oracle")
    if oracle is None:
        return 0, 0
    return oracle.comparisons.num_compared, oracle.comparisons.num_forgiven


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
