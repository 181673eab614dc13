"""Ctrl-C at `serve run`, known to a process of its cluster before Serve acts on it.

Serve ends its proxies first, and every connection with them. The terminal sends the signal to a
whole group of processes, though: one that is put into the group of `serve run` and does nothing
ends at the same moment. It knows nothing of requests.
"""

import asyncio
import logging
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

from app import ray_private

logger = logging.getLogger(__name__)


async def interrupts() -> AsyncIterator[None]:
    """An item at each Ctrl-C of the `serve run` on this node; ends where none can be known of."""
    serve_run = await asyncio.to_thread(ray_private.find_serve_run)
    if serve_run is not None and not _ignores_interrupts(serve_run.pid):
        async for interrupt in interrupts_of_group(serve_run.pid):
            yield interrupt


async def interrupts_of_group(pid: int) -> AsyncIterator[None]:
    """An item at each interrupt of the group of this process; ends where it cannot be joined."""
    while True:
        try:
            sentinel = _start_sentinel(os.getpgid(pid))
        except (OSError, subprocess.SubprocessError) as error:
            # It is in another session, or has ended.
            logger.info("interrupts of process %s are not known here: %s", pid, error)
            return
        try:
            await _end_of(sentinel)
        finally:
            sentinel.kill()
            sentinel.communicate()
        if sentinel.returncode != -signal.SIGINT:
            logger.warning("what waits for interrupts ended with %s", sentinel.returncode)
            return
        yield


def _ignores_interrupts(pid: int) -> bool:
    """As what a script starts in the background does."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    ignored = next(line for line in status.splitlines() if line.startswith("SigIgn:"))
    return bool(int(ignored.split()[1], 16) >> (signal.SIGINT - 1) & 1)


def _start_sentinel(group: int) -> subprocess.Popen[bytes]:
    """A process of this group that ends at an interrupt, and with this process."""
    # Ray blocks the signal in its workers, and a child would inherit that.
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=group
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


async def _end_of(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of its output; the loop may be one whose own processes know no groups."""
    assert process.stdout is not None
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(process.stdout, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process.stdout)
