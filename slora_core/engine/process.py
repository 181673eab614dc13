"""The owner's side of an engine process: starts it, sends requests, hands out its tokens.

Used by an engine replica on its event loop. Knows messages only; the engine itself, its memory
and its steps live in the other process (`engine_main`), which ends when this one does.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator
from multiprocessing.connection import Connection
from pathlib import Path

from slora_core.adapters.slab_format import AdapterLocation
from slora_core.engine.protocol import (
    AbortRequest,
    Action,
    AddRequest,
    Call,
    DropAdapter,
    EngineInfo,
    EngineSpec,
    Failed,
    Refused,
    Reply,
    StepOutputs,
    receive_message,
    send_message,
)
from slora_core.errors import EngineDeadError
from slora_core.requests import RequestOutput, SamplingParams
from slora_core.stats import EngineStats

logger = logging.getLogger(__name__)

# How long `close` waits for the process before it is killed, seconds.
CLOSE_TIMEOUT_S = 5.0

# How long an idle math thread of the engine spins before it sleeps, libgomp's iterations. Left to
# itself it spins for milliseconds, in which the ingress and Ray lack the core: one stream of the
# demo model on two cores falls from 24 tokens/s to 4 beside one other busy process, with this
# from 20 to 11. An operator's own setting is kept.
SPIN_COUNT = 5000


class AsyncEngine:
    """An engine in a process of its own, driven from one asyncio event loop.

    Every method must be called on the loop that ran `start`. The process is tied to the thread
    that calls `start` (Linux ends it when that thread ends), so call it on a lasting one.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[EngineInfo] | None = None
        self._streams: dict[str, asyncio.Queue[RequestOutput | Exception]] = {}
        self._calls: dict[int, asyncio.Future[object]] = {}
        self._call_ids = itertools.count()
        # Why the engine is dead; None while it lives.
        self._death: str | None = None

    async def start(self) -> EngineInfo:
        """Start the process and wait until it serves.

        Raises:
            EngineDeadError: it ended before it was ready; the message carries its reason.
        """
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.create_future()
        ours, theirs = socket.socketpair()
        # The package may lie in the working directory only, which the child need not share.
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "slora_core.engine.main", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={"GOMP_SPINCOUNT": str(SPIN_COUNT), **os.environ, "PYTHONPATH": path},
            )
        self._connection = Connection(ours.detach())
        self._send(self._spec)
        threading.Thread(target=self._read, name="engine-outbox", daemon=True).start()
        return await self._started

    async def generate(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        adapter: AdapterLocation | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request, one a step that gave it a token; the last has a finish reason.

        Closing the generator early aborts the request. `adapter` must stay leased until
        `release_adapter_source` has returned.

        Raises:
            InvalidRequestError, AdapterTooLargeError: the engine refused the request.
            EngineDeadError: the process died; what came before is all there is.
        """
        stream: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        ended = False
        self._check_alive()
        assert request_id not in self._streams, f"{request_id} is running already"
        self._streams[request_id] = stream
        try:
            self._send(AddRequest(request_id, prompt_ids, params, adapter))
            while not ended:
                item = await stream.get()
                ended = isinstance(item, Exception) or item.finish_reason is not None
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            del self._streams[request_id]
            if not ended:
                self.abort(request_id)

    def abort(self, request_id: str) -> None:
        """Stop a request; its generator ends with finish reason "abort". Unknown ids are fine."""
        self._send(AbortRequest(request_id))

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

    @property
    def num_streams(self) -> int:
        """Requests whose outputs somebody reads."""
        return len(self._streams)

    def is_alive(self) -> bool:
        return self._death is None and self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """End the process; running requests fail with EngineDeadError. May be called twice."""
        if self._connection is not None and not self._connection.closed:
            # The engine ends itself at the end of the connection, whatever it is computing.
            with contextlib.suppress(OSError):
                _shut_down(self._connection)
        if self._process is not None:
            try:
                self._process.wait(CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._die("the engine was closed")

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

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)

    def _send(self, message: object) -> None:
        if self._death is None and self._connection is not None:
            try:
                send_message(self._connection, message)
            except OSError:
                # The reader thread sees the end of the connection too and says why.
                logger.debug("the engine's connection is closed")

    def _read(self) -> None:
        """Hand messages to the event loop until the process ends; runs in a thread."""
        assert self._connection is not None and self._loop is not None
        reason = "the engine process ended"
        while True:
            try:
                message = receive_message(self._connection)
            except (EOFError, OSError):
                break
            except Exception as error:
                logger.exception("a message of the engine could not be read")
                reason = f"a message of the engine could not be read: {error}"
                break
            if isinstance(message, Failed):
                reason = message.reason
                break
            self._on_loop(self._dispatch, message)
        self._on_loop(self._die, reason)

    def _on_loop(self, callback: object, argument: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody listens any more.
            self._loop.call_soon_threadsafe(callback, argument)  # type: ignore[arg-type]

    def _dispatch(self, message: object) -> None:
        match message:
            case StepOutputs(outputs):
                for output in outputs:
                    if stream := self._streams.get(output.request_id):
                        stream.put_nowait(output)
            case Refused(request_id, error):
                if stream := self._streams.get(request_id):
                    stream.put_nowait(error)
            case Reply(call_id, value, error):
                if (future := self._calls.get(call_id)) and not future.done():
                    if error is None:
                        future.set_result(value)
                    else:
                        future.set_exception(AssertionError(error))
            case EngineInfo():
                assert self._started is not None
                self._started.set_result(message)

    def _die(self, reason: str) -> None:
        """Fail everything that waits on the engine; the first reason is kept."""
        if self._death is not None:
            return
        self._death = reason
        for stream in self._streams.values():
            stream.put_nowait(EngineDeadError(reason))
        for future in (*self._calls.values(), self._started):
            if future is not None and not future.done():
                future.set_exception(EngineDeadError(reason))


def _shut_down(connection: Connection) -> None:
    """Close both directions of a connection over a socket, waking a thread that reads it."""
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)
