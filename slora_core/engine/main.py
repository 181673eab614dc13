"""The engine process: `python -m slora_core.engine.main FD`, started by `engine.process`.

Reads messages from the inherited socket FD in a thread of its own, steps the engine in the
main thread, answers with one message a step. Ends when the connection does, or with its parent.
"""

import ctypes
import faulthandler
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from slora_core.adapters.host_pinning import pin_in_background
from slora_core.adapters.slab_format import AdapterLocation
from slora_core.adapters.slab_reader import SlabReader
from slora_core.engine.engine import Engine
from slora_core.engine.protocol import (
    AbortRequest,
    AddAdapter,
    Begun,
    Busy,
    Call,
    DropAdapter,
    EngineInfo,
    EngineSpec,
    Failed,
    Reply,
    receive_message,
    send_message,
)
from slora_core.errors import EngineFaultError, SLoRAError, StoreGoneError
from slora_core.requests import FinishReason, Request, StepOutput

logger = logging.getLogger(__name__)

# Seconds without work after which an engine does what it put off, and how long each piece of it
# may take: libraries may have to be set up.
IDLE_S = 0.5
CAPTURE_S = 120.0

# prctl(2): the signal a process receives when the thread that started it ends.
_PR_SET_PDEATHSIG = 1


class EngineLoop:
    """Drives an engine by messages; everything but `_read` runs in the main thread."""

    def __init__(self, connection: socket.socket, engine: Engine) -> None:
        self._connection = connection
        self._engine = engine
        engine.on_begin = lambda request_ids: self._send(Begun(request_ids))
        on_map = pin_in_background if engine.config.device == "cuda" else None
        self._slabs = SlabReader(engine.geometry, on_map)
        # Why adapters that requests may name could not be added.
        self._unusable: dict[str | None, SLoRAError] = {}
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._worked_at = time.monotonic()
        threading.Thread(target=self._read, name="engine-inbox", daemon=True).start()

    def run(self) -> None:
        """Handle messages and step, for ever; blocks on the inbox while there is no work."""
        while True:
            self.run_once()

    def run_once(self) -> None:
        """Handle the messages that are there, then step, or capture a graph after a while idle."""
        self._handle_messages(block=not self._engine.has_work)
        if self._engine.has_work:
            output = self._engine.step()
            if output:
                self._send(output)
            self._worked_at = time.monotonic()
        elif self._engine.has_late_graphs and time.monotonic() >= self._worked_at + IDLE_S:
            self._send(Busy(CAPTURE_S, "it captures a CUDA graph"))
            self._engine.capture_late_graph()

    def _read(self) -> None:
        """Queue messages until the owner closes its end or dies, then end the process."""
        while True:
            try:
                self._inbox.put(receive_message(self._connection))
            except (EOFError, OSError):
                # Nobody is left to answer; exit at once, whatever the main thread computes.
                os._exit(0)
            except BaseException:
                logger.exception("a message could not be read; the engine process ends")
                os._exit(1)

    def _send(self, message: object) -> None:
        send_message(self._connection, message)

    def _handle_messages(self, *, block: bool) -> None:
        """Handle all that is there; with `block` wait for the first, while nothing is put off."""
        timeout = IDLE_S if self._engine.has_late_graphs else None
        while True:
            try:
                message = self._inbox.get(block, timeout)
            except queue.Empty:
                return
            block = False
            self._handle(message)

    def _handle(self, message: object) -> None:
        match message:
            case Request():
                self._add_request(message)
            case AddAdapter(location):
                self._add_adapter(location)
            case AbortRequest(request_id):
                if self._engine.abort(request_id):
                    self._send(StepOutput(endings={request_id: FinishReason.ABORT}))
            case DropAdapter(adapter_id):
                self._engine.drop_adapter(adapter_id)
            case Call():
                self._send(self._answer(message))
            case _:
                raise TypeError(f"unknown message {message!r}")

    def _add_adapter(self, location: AdapterLocation) -> None:
        adapter_id = location.adapter_id
        self._unusable.pop(adapter_id, None)
        # Known pages are under a lease still, whatever became of the store of this location.
        if not self._engine.has_adapter(adapter_id):
            try:
                self._engine.add_adapter(self._slabs.open(location))
            except SLoRAError as error:
                self._unusable[adapter_id] = error
            except (OSError, MemoryError) as error:
                # For want of memory or descriptors, which may be there for a lease anew.
                logger.exception("adapter %s cannot be mapped", adapter_id)
                self._unusable[adapter_id] = StoreGoneError(
                    f"the engine cannot map the adapter's memory: {error}"
                )
            except Exception as error:
                # A matter of this adapter's requests alone.
                logger.exception("adapter %s cannot be used", adapter_id)
                self._unusable[adapter_id] = EngineFaultError(
                    f"the engine cannot use the adapter's pages: {error!r}"
                )

    def _add_request(self, request: Request) -> None:
        refusal = self._unusable.get(request.adapter_id)
        if refusal is None:
            try:
                self._engine.add_request(request)
                return
            except SLoRAError as error:
                refusal = error
            except Exception as error:
                logger.exception("request %s cannot be queued", request.request_id)
                # Wherever it has come to.
                self._engine.abort(request.request_id)
                refusal = EngineFaultError(f"the engine cannot queue the request: {error!r}")
        self._send(StepOutput(endings={request.request_id: refusal}))

    def _answer(self, call: Call) -> Reply:
        try:
            match call.action:
                case "ping":
                    pass
                case "stats":
                    return Reply(call.call_id, self._engine.stats())
                case "check_integrity":
                    self._engine.check_integrity()
                case "release_adapter_source":
                    self._engine.release_adapter(call.argument)
                    self._unusable.pop(call.argument, None)
        except AssertionError as error:
            return Reply(call.call_id, error=str(error))
        return Reply(call.call_id)


def main() -> None:
    serve_engine(_pretrained)


def _pretrained(spec: EngineSpec) -> Engine:
    return Engine.from_pretrained(Path(spec.model_path), spec.engine, load_format=spec.load_format)


def serve_engine(make_engine: Callable[[EngineSpec], Engine]) -> None:
    """Be an engine process from its start to its end."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    # What the owner asks for where this process hangs.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _end_with_parent()
    connection = socket.socket(fileno=int(sys.argv[1]))
    engine = None
    try:
        spec: EngineSpec = receive_message(connection)
        torch.set_num_threads(spec.num_threads or _default_threads(spec.engine.device))
        engine = make_engine(spec)
        logger.info(
            "ready in %.1f s: %s",
            sum(engine.startup_s.values()),
            ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in engine.startup_s.items()),
        )
        # What a start made stays: searching it for garbage would hold up a step by 0.1 s or more.
        gc.collect()
        gc.freeze()
        loop = EngineLoop(connection, engine)
        info = EngineInfo(
            pid=os.getpid(),
            num_pages=engine.config.num_pages,
            page_tokens=spec.engine.page_tokens,
            context_len=spec.engine.context_len(engine.model),
            geometry=engine.geometry,
        )
        send_message(connection, info)
        loop.run()
    except EOFError:
        # The owner ended before it sent a spec.
        return
    except Exception as error:
        logger.exception("the engine process ends")
        send_message(connection, _failed(error, engine))
        sys.exit(1)


def _failed(error: Exception, engine: Engine | None) -> Failed:
    """What the owner is told of the end; after a start clients are, too, and get no traceback."""
    if engine is None:
        return Failed(str(error) if isinstance(error, SLoRAError) else traceback.format_exc())
    request_ids = tuple(engine.step_request_ids())
    if request_ids:
        logger.error("the requests of its step: %s", ", ".join(request_ids))
    return Failed(f"the engine ended, since it failed: {error!r}", request_ids)


def _default_threads(device: str) -> int:
    """Every core computes for a CPU engine; a GPU's plans its steps by tiny tensors.

    On those, waking up other threads takes milliseconds (seen: 2.6 ms in `repeat_interleave`).
    """
    return len(os.sched_getaffinity(0)) if device == "cpu" else 1


def _end_with_parent() -> None:
    """Have the kernel kill this process with its parent, even while it computes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


if __name__ == "__main__":
    main()
