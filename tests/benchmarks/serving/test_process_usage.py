"""Usage is read of every descendant, and growth is told of processes that last."""

import os
import subprocess
import sys
import time

import pytest

from benchmarks.serving.process_usage import (
    Growth,
    Usage,
    cpu_shares,
    growth_of_processes,
    role_of,
    usage_of_descendants,
)

MIB = 2**20


@pytest.mark.parametrize(
    ("cmdline", "role"),
    [
        (b"ray::ServeReplica:slora:engine(EngineServer)\0", "ServeReplica:slora:engine"),
        (b"/usr/bin/python3\0-m\0slora_core.engine.main\0007\0", "slora_core.engine.main"),
        (b"/usr/bin/python3\0-u\0/x/dashboard/dashboard.py\0--host=h\0", "dashboard.py"),
        (b"/x/ray/core/src/ray/raylet/raylet\0--port=1\0", "raylet"),
        (b"python3\0-m\0", "python3"),
        (b"", "?"),
    ],
)
def test_roles(cmdline, role):
    assert role_of(cmdline) == role


def test_grandchildren_are_seen_and_this_process_is_not():
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as child:
        try:
            deadline = time.monotonic() + 20
            while len(usage := usage_of_descendants(child.pid)) < 1:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            [(pid, of_grandchild)] = usage.items()
            assert pid not in (child.pid, os.getpid())
            assert of_grandchild.own_bytes > MIB and of_grandchild.num_fds >= 3
            assert {child.pid, pid} <= set(usage_of_descendants(os.getpid()))
        finally:
            child.communicate(b"\n", timeout=20)
    assert usage_of_descendants(child.pid) == {}


def test_shared_memory_is_told_apart():
    program = (
        "import mmap\n"
        "shared = mmap.mmap(-1, 32 << 20)\n"
        "shared.write(bytes(32 << 20))\n"
        "print(flush=True)\n"
        "input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        usage = usage_of_descendants(os.getpid())[child.pid]
        child.communicate(b"\n", timeout=20)
    assert 32 * MIB <= usage.shared_bytes < 34 * MIB
    assert MIB < usage.own_bytes < 96 * MIB


def test_growth_by_medians_of_processes_that_last():
    def sample(mib, num_fds, **others):
        lasting = {1: Usage("engine", mib * MIB, 0, num_fds, 1.0)}
        return lasting | {int(pid[1:]): usage for pid, usage in others.items()}

    first = [
        sample(100, 10),
        sample(100, 10, p2=Usage("worker", 5 * MIB, 0, 3, 1.0)),
        sample(400, 90),
    ]
    last = [sample(103, 10), sample(50, 12), sample(103, 12)]
    memory, descriptors = growth_of_processes(first, last)
    assert memory == [Growth("engine 1", 100, 103)]
    assert memory[0].share == pytest.approx(0.03)
    assert descriptors == [Growth("engine 1", 10, 12)]


@pytest.mark.parametrize(("first", "last", "share"), [(0, 0, 0.0), (0, 5, 1.0), (10, 5, -0.5)])
def test_share(first, last, share):
    assert Growth("x", first, last).share == share


def test_cpu_time_is_of_each_process():
    program = "import time\nwhile time.process_time() < 0.3: pass\ninput()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as child:
        try:
            deadline = time.monotonic() + 20
            while usage_of_descendants(os.getpid())[child.pid].cpu_s < 0.25:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            child.communicate(b"\n", timeout=20)


def test_shares_of_the_cores():
    first = {1: Usage("old", 0, 0, 0, 5.0), 2: Usage("gone", 0, 0, 0, 5.0)}
    last = {1: Usage("old", 0, 0, 0, 6.0), 3: Usage("new", 0, 0, 0, 4.0)}
    assert cpu_shares(first, last, 10.0) == [("new", 0.4), ("old", 0.1)]
