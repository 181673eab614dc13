"""The owner's side of an engine process: starts it, sends requests, hands out its tokens.

Used by an engine replica on its event loop. Knows messages only; the engine itself, its memory
and its steps live in the other process (`engine.main`), which ends when this one does.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from slora_core.adapters.slab_format import AdapterLocation
from slora_core.engine.link import EngineLink
from slora_core.engine.protocol import (
    AbortRequest,
    Action,
    AddAdapter,
    Begun,
    Busy,
    Call,
    DropAdapter,
    EngineInfo,
    EngineSpec,
    Failed,
    Reply,
    packed,
)
from slora_core.engine.streams import DeltaStream, DeltaStreams
from slora_core.engine.watchdog import Watchdog
from slora_core.errors import EngineDeadError
from slora_core.requests import Request, StepOutput
from slora_core.stats import EngineStats

logger = logging.getLogger(__name__)

# How long `close` waits for the process before it is killed, seconds.
CLOSE_TIMEOUT_S = 5.0

# How long an idle math thread of the engine spins before it sleeps, libgomp's iterations. Left to
# itself it spins for milliseconds, in which the ingress and Ray lack the core: one stream of the
# demo model on two cores falls from 24 tokens/s to 4 beside one other busy process, with this
# from 20 to 11. An operator's own setting is kept.
SPIN_COUNT = 5000

# How long the end of a connection is before that of its process, at most, seconds.
EXIT_TIMEOUT_S = 1.0
EXIT_POLL_S = 0.002

# How long a hung process has to write where it hangs to its log before it is killed, seconds.
DUMP_S = 0.5


class AsyncEngine:
    """An engine in a process of its own, driven from one asyncio event loop.

    Every method must be called on the loop that ran `start`. The process is tied to the thread
    that calls `start` (Linux ends it when that thread ends), so call it on a lasting one.

    Args:
        interval_s: for how long tokens gather in a stream, seconds, by the number of streams.
        on_left: told the id of each request that the engine aborted because its stream was left;
            not of one that had ended by then.
        program: the module that is run as the process; it speaks `protocol` as ours does.
    """

    def __init__(
        self,
        spec: EngineSpec,
        interval_s: Callable[[int], float] = lambda num_streams: 0.0,
        on_left: Callable[[str], None] = lambda request_id: None,
        program: str = "slora_core.engine.main",
    ) -> None:
        self._spec = spec
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        # The same connection twice: to shut down whatever the loop does, and to write to.
        self._socket: socket.socket | None = None
        self._transport: asyncio.Transport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[EngineInfo] | None = None
        self._streams = DeltaStreams(interval_s, self.abort, on_left)
        self._calls: dict[int, asyncio.Future[object]] = {}
        self._call_ids = itertools.count()
        self._watchdog: Watchdog | None = None
        # Runs from the end of the connection until it is known how the process ended.
        self._dying: asyncio.Task[None] | None = None
        # Why the engine is dead; None while it lives.
        self._death: str | None = None
        self._died = asyncio.Event()

    async def start(self) -> EngineInfo:
        """Start the process and wait until it serves.

        Raises:
            EngineDeadError: it ended before it was ready; the message carries its reason.
        """
        self._started = asyncio.get_running_loop().create_future()
        ours, theirs = socket.socketpair()
        # The package may lie in the working directory only, which the child need not share.
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={"GOMP_SPINCOUNT": str(SPIN_COUNT), **os.environ, "PYTHONPATH": path},
            )
        await self.connect(ours)
        self._send(self._spec)
        info = await self._started
        self._watchdog = Watchdog(self._spec.stall_s, self._ping, self._end_hung)
        return info

    async def connect(self, connection: socket.socket) -> None:
        """Speak with the engine at the other end of a socket; `start` does."""
        self._loop = asyncio.get_running_loop()
        connection.setblocking(False)
        self._socket = connection
        link = EngineLink(self._dispatch, self._die, self._disconnected)
        self._transport, _ = await self._loop.create_unix_connection(lambda: link, sock=connection)

    def generate(self, request: Request) -> DeltaStream:
        """Start a request; its deltas come from the stream, errors of the engine among them.

        Leaving the stream's context early aborts the request. Its adapter was sent by
        `add_adapter` and must stay leased until `release_adapter_source` has returned.

        Raises:
            EngineDeadError: the process has ended.
        """
        self._check_alive()
        stream = self._streams.open(request.request_id)
        self._send(request)
        return stream

    def abort(self, request_id: str) -> None:
        """Stop a request; its stream ends with finish reason "abort". Unknown ids are fine."""
        self._send(AbortRequest(request_id))

    def add_adapter(self, location: AdapterLocation) -> None:
        """Say where a leased adapter's host pages lie, before requests name it.

        Where they cannot be used, those requests end with the reason: StoreGoneError,
        AdapterTooLargeError.
        """
        self._send(AddAdapter(location))

    async def release_adapter_source(self, adapter_id: str) -> None:
        """Have the engine let go of an adapter's host pages, which no request here uses.

        Only when this has returned may the adapter's lease be given back: until then the engine
        may still be copying. Copies in the pool stay as a cache.
        """
        await self._call("release_adapter_source", adapter_id)

    def drop_adapter(self, adapter_id: str) -> None:
        """Free an unloaded adapter's pool pages once its running requests have ended."""
        self._send(DropAdapter(adapter_id))

    async def stats(self) -> EngineStats:
        stats = await self._call("stats")
        assert isinstance(stats, EngineStats)
        return stats

    async def check_integrity(self) -> None:
        """Check the pool's invariant in the engine.

        Raises:
            AssertionError: a page has no owner or two, with the counts.
        """
        await self._call("check_integrity")

    def is_alive(self) -> bool:
        return self._death is None and self._process is not None and self._process.poll() is None

    @property
    def num_streams(self) -> int:
        """Requests that were sent and are still read."""
        return len(self._streams)

    async def wait_dead(self) -> None:
        """Wait until the engine has died, however it did, and nobody reads of it any more."""
        await self._died.wait()
        while len(self._streams) or (self._process is not None and self._process.poll() is None):
            await asyncio.sleep(EXIT_POLL_S)

    def close(self) -> None:
        """End the process; running requests fail with EngineDeadError. May be called twice."""
        if self._socket is not None:
            # The engine ends itself at the end of the connection, whatever it is computing. Not by
            # the transport, whose loop may be busy with this call, or closed.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._process is not None:
            try:
                self._process.wait(CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        # Where the loop is closed nobody waits any more.
        with contextlib.suppress(RuntimeError):
            self._die("the engine was closed", is_own_fault=False)

    async def _call(self, action: Action, argument: str = "") -> object:
        self._check_alive()
        assert self._loop is not None
        call_id = next(self._call_ids)
        future: asyncio.Future[object] = self._loop.create_future()
        self._calls[call_id] = future
        try:
            self._send(Call(call_id, action, argument))
            return await future
        finally:
            del self._calls[call_id]

    def _ping(self) -> None:
        # A reply that nobody waits for: that it comes is all.
        self._send(Call(next(self._call_ids), "ping"))

    def _end_hung(self, reason: str) -> None:
        """Fail what waits, now, and end the process once it has logged where it hangs."""
        logger.error("%s; its process is killed, with its stacks in the log before", reason)
        assert self._process is not None and self._loop is not None
        self._process.send_signal(signal.SIGUSR1)
        self._die(reason)
        self._loop.call_later(DUMP_S, self._process.kill)

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)

    def _send(self, message: object) -> None:
        if self._death is None and self._transport is not None:
            self._transport.write(packed(message))

    def _dispatch(self, message: object) -> None:
        if self._watchdog is not None:
            self._watchdog.heard()
        match message:
            case StepOutput():
                self._streams.take(message)
            case Begun(request_ids):
                self._streams.begun(request_ids)
            case Reply(call_id, value, error):
                if (future := self._calls.get(call_id)) and not future.done():
                    if error is None:
                        future.set_result(value)
                    else:
                        future.set_exception(AssertionError(error))
            case EngineInfo():
                assert self._started is not None
                self._started.set_result(message)
            case Busy(seconds, reason):
                if self._watchdog is not None:
                    self._watchdog.announced(seconds, reason)
            case Failed(reason, request_ids):
                self._die(reason, request_ids)

    def _disconnected(self) -> None:
        if self._death is None:
            self._dying = asyncio.get_running_loop().create_task(self._die_of_exit())

    async def _die_of_exit(self) -> None:
        """Fail what waits once it is known how the process ended."""
        status: int | None = None
        if self._process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXIT_TIMEOUT_S):
                    while (status := self._process.poll()) is None:
                        await asyncio.sleep(EXIT_POLL_S)
        how = "the engine process ended"
        if status is not None:
            how += f" by signal {-status}" if status < 0 else f" with status {status}"
        # Nothing that an engine computes sends itself this one.
        self._die(how, is_own_fault=status != -signal.SIGKILL)

    def _die(
        self, reason: str, request_ids: Collection[str] = (), is_own_fault: bool = True
    ) -> None:
        """Fail everything that waits on the engine; the first reason is kept.

        Where it is the engine's own fault, `request_ids`, of the steps it died in, are suspects;
        where it could not say, each that had begun is.
        """
        if self._death is not None:
            return
        self._death = reason
        self._died.set()
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._transport is not None:
            # Nothing more is read: after a message that could not be, nothing makes sense.
            self._transport.abort()
        for stream in self._streams:
            was_running = stream.request_id in request_ids if request_ids else stream.has_begun
            stream.end(EngineDeadError(reason, is_suspect=is_own_fault and was_running))
        for future in (*self._calls.values(), self._started):
            if future is not None and not future.done():
                future.set_exception(EngineDeadError(reason))
