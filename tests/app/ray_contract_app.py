"""A small Serve application for the contracts of `app.ray_private`: no engine, no adapters.

Serve pickles this module by value, since it holds a router: it imports nothing heavy.
"""

import asyncio
import io
import logging.handlers
import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

from ray import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from app import ray_private
from app.serve_log import log_with_serve


class CountingRouter(ray_private.PatientRouter):
    """Prefers the replica that it has sent the fewest of those requests to that run.

    Adds a byte to the file `calls` each time it is asked, in whichever process it runs, and writes
    what replicas answer to the file beside it. Has no replica for the session "nowhere".
    """

    def initialize_state(self, calls: str) -> None:
        self._calls = Path(calls)
        self._held: Counter[str] = Counter()

    async def choose_replicas(self, candidate_replicas, pending_request):
        with self._calls.open("ab") as file:
            file.write(b".")
        ray_private.pause_when_all_are_full(pending_request)
        if pending_request.metadata.session_id == "nowhere":
            return []
        ids = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[ids[key]] for key in sorted(ids, key=lambda key: (self._held[key], key))]

    def on_sending(self, replica_id) -> None:
        self._held[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id, internal_request_id) -> None:
        self._held[replica_id.unique_id] -= 1

    def on_counted(self, replica_id, num_requests) -> None:
        with self._calls.with_name("counts").open("a") as file:
            file.write(f"{num_requests}\n")


class Replica:
    """Streams its process's id and then, until the file `release` is there, nothing."""

    async def items(self, release: str = "") -> AsyncIterator[object]:
        yield os.getpid()
        while release and not Path(release).exists():
            await asyncio.sleep(0.02)
        yield {"last": True}


@ray_private.ingress_built_in_replica
class ContractIngress:
    def __init__(self, greeting: str, replica) -> None:
        self._greeting = greeting
        self._replica = replica

    def build_asgi_app(self) -> Starlette:
        """Needs what the constructor was given, which does not pickle with an application."""
        self._pid = os.getpid()
        return Starlette(
            routes=[
                Route("/greeting", self._greet),
                Route("/streams", self._streams),
                Route("/by_name", self._by_name),
                Route("/log", self._log),
            ]
        )

    async def _greet(self, request: Request) -> JSONResponse:
        return JSONResponse({"greeting": self._greeting, "built_here": self._pid == os.getpid()})

    async def _streams(self, request: Request) -> JSONResponse:
        """Several calls from within one HTTP request, at once."""
        streams = [
            ray_private.stream_by_value(self._replica, "items", "a")
            for _ in range(int(request.query_params["num"]))
        ]

        async def num_items(stream) -> int:
            return len([item async for item in stream])

        counts = await asyncio.wait_for(asyncio.gather(*map(num_items, streams)), 10)
        request_ids = {stream._request_metadata.internal_request_id for stream in streams}
        return JSONResponse({"counts": counts, "num_request_ids": len(request_ids)})

    async def _by_name(self, request: Request) -> JSONResponse:
        """On the event loop; no application of this name is there."""
        handle = ray_private.handle_by_name("nowhere", "nobody")
        return JSONResponse({"deployment": handle.deployment_name})

    async def _log(self, request: Request) -> JSONResponse:
        """Where Serve writes two lines of the project's: its log's file, and the terminal."""
        log_with_serve()
        log_with_serve()
        handlers = logging.getLogger("ray.serve").handlers
        [terminal] = [h for h in handlers if type(h) is logging.StreamHandler]
        [file] = [h for h in handlers if isinstance(h, logging.handlers.MemoryHandler)]
        before = terminal.setStream(written := io.StringIO())
        logger = logging.getLogger("app.contracts")
        logger.info("for both", extra={"answer_id": "cmpl-1"})
        logger.info("for the file", extra={"moves": 2, **ray_private.NOT_ON_TERMINAL})
        logger.debug("for nobody")
        terminal.setStream(before)
        return JSONResponse({"file": file.target.baseFilename, "terminal": written.getvalue()})


def contract_app(calls: Path, **limits):
    """Two replicas behind a counting router."""
    router = serve.config.RequestRouterConfig(
        request_router_class=CountingRouter,
        request_router_kwargs={"calls": str(calls)},
    )
    replica = serve.deployment(Replica).options(
        name="replica",
        num_replicas=2,
        request_router_config=router,
        ray_actor_options={"num_cpus": 0.1},
        **limits,
    )
    ingress = serve.deployment(ContractIngress).options(
        name="ingress",
        ray_actor_options={"num_cpus": 0.1},
        logging_config={"encoding": "JSON"},
    )
    return ingress.bind("hello", replica.bind())
