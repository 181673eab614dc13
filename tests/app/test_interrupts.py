"""Ctrl-C at another process, known of by being in its group."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from app.interrupts import _ignores_interrupts, interrupts_of_group

TIMEOUT_S = 20


@pytest.fixture(autouse=True)
def in_the_foreground():
    """Tests that run in the background ignore interrupts, and so would what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def program(**options):
    """A process that leads a group and catches interrupts, as `serve run` does."""
    code = "import signal, sys; signal.signal(signal.SIGINT, lambda *_: None); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options
    ) as process:
        process.stdout.readline()
        yield process
        process.stdin.close()


def group_of(pid):
    """Process ids in a group."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getpgid(int(name)) == pid:
                found.append(int(name))
        except OSError:
            continue
    return found


def test_each_interrupt_is_told_once_also_where_it_is_blocked_here():
    """Ray blocks it in its workers."""

    async def run(process):
        heard = interrupts_of_group(process.pid)
        for _ in range(2):
            waiting = asyncio.ensure_future(anext(heard))
            async with asyncio.timeout(TIMEOUT_S):
                while len(group_of(process.pid)) != 2:
                    await asyncio.sleep(0.01)
                os.killpg(process.pid, signal.SIGINT)
                await waiting
        assert process.poll() is None
        waiting = asyncio.ensure_future(anext(heard))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert group_of(process.pid) == [process.pid]

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with program(process_group=0) as process:
            asyncio.run(run(process))
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_group_of_another_session_cannot_be_joined():
    async def run(process):
        return [item async for item in interrupts_of_group(process.pid)]

    with program(start_new_session=True) as process:
        assert asyncio.run(run(process)) == []


def test_what_waits_may_be_ended_by_somebody_else():
    async def run(process):
        waiting = asyncio.ensure_future(anext(interrupts_of_group(process.pid), None))
        async with asyncio.timeout(TIMEOUT_S):
            while len(group_of(process.pid)) != 2:
                await asyncio.sleep(0.01)
            [sentinel] = set(group_of(process.pid)) - {process.pid}
            os.kill(sentinel, signal.SIGTERM)
            assert await waiting is None

    with program(process_group=0) as process:
        asyncio.run(run(process))


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_program_of_a_script_in_the_background_ignores_interrupts(handler):
    with subprocess.Popen(
        [sys.executable, "-c", "print(); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    ) as process:
        process.stdout.readline()
        assert _ignores_interrupts(process.pid) == (handler == signal.SIG_IGN)
        process.stdin.close()
    assert _ignores_interrupts(process.pid)
