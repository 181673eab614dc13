"""The HTTP side: routes, bodies, events and statuses of the OpenAI API.

Stateless beside its copy of the registry. It knows Starlette and the registry's and service's
methods; `api_app` makes the ASGI application, which `build` puts under Serve.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app.http.bodies import BodyReader
from app.http.deadline import deadline_of
from app.http.errors import ApiError, api_error
from app.http.origin import check_origin
from app.http.parsing import Model, parse_body
from app.http.responses import Answer
from app.http.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    LoadAdapterRequest,
    ModelList,
    SamplingFields,
    UnloadAdapterRequest,
)
from app.http.service import CompletionService
from app.registry.state import AdapterRecord
from app.remote_errors import is_actor_death, is_cancellation
from slora_core.errors import AdapterNotFoundError

Result = TypeVar("Result")
Sampling = TypeVar("Sampling", bound=SamplingFields)
Handler = Callable[[Request], Awaitable[Response]]
Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]
# 499 is nginx's status for a client that left; it is logged, nobody reads it.
CLIENT_LEFT = Response(status_code=499)

# Seconds for which a stream's status line waits for its first piece.
FIRST_PIECE_S = 5.0

# Bodies from this size on are parsed on a thread: smaller ones take a millisecond or two.
LARGE_BODY_BYTES = 2**16


class RegistryAdmin(Protocol):
    """What the ingress needs of the registry beside reading it."""

    async def load(self, name: str, path: str, replace: bool) -> AdapterRecord: ...

    async def unload(self, name: str) -> None: ...


class Ingress:
    """Request handlers; one object a process.

    Args:
        is_ready: whether an engine replica answers.
        check_room: raises where no request may be accepted.
    """

    def __init__(
        self,
        service: CompletionService,
        registry: RegistryAdmin,
        is_ready: Callable[[], Awaitable[bool]],
        bodies: BodyReader,
        check_room: Callable[[], None],
    ) -> None:
        self._service = service
        self._registry = registry
        self._is_ready = is_ready
        self._bodies = bodies
        self._check_room = check_room

    async def completions(self, request: Request) -> Response:
        body, deadline = await self._accept(CompletionRequest, request)
        answer = await self._service.complete(body, deadline)
        return await self._answer(request, answer, body.stream)

    async def chat_completions(self, request: Request) -> Response:
        body, deadline = await self._accept(ChatCompletionRequest, request)
        answer = await self._service.chat(body, deadline)
        return await self._answer(request, answer, body.stream)

    async def list_models(self, request: Request) -> Response:
        return _json(ModelList(data=self._service.model_cards()))

    async def get_model(self, request: Request) -> Response:
        return _json(await self._service.model_card(request.path_params["name"]))

    async def load_adapter(self, request: Request) -> Response:
        check_origin(request)
        body = await self._parse(LoadAdapterRequest, request)
        self._service.check_base_name(body.base_model_name)
        record = await self._registry.load(body.lora_name, body.lora_path, body.load_inplace)
        # So that a request that follows this answer finds the adapter here.
        await self._service.registry.refresh()
        return _json(self._service.adapter_card(record))

    async def unload_adapter(self, request: Request) -> Response:
        check_origin(request)
        body = await self._parse(UnloadAdapterRequest, request)
        try:
            await self._registry.unload(body.lora_name)
        except AdapterNotFoundError as error:
            return ApiError(404, str(error), "lora_name").response()
        await self._service.registry.refresh()
        return JSONResponse({"id": body.lora_name, "object": "model", "deleted": True})

    async def health(self, request: Request) -> Response:
        if await self._is_ready():
            return JSONResponse({"status": "ok"})
        return ApiError(503, "no engine replica answers").response()

    async def _accept(
        self, model: type[Sampling], request: Request
    ) -> tuple[Sampling, float | None]:
        """A body and its deadline; where there is no room, nothing is spent on it."""
        arrived_at = time.time()
        self._check_room()
        body = await self._parse(model, request)
        return body, deadline_of(request, body, arrived_at)

    async def _parse(self, model: type[Model], request: Request) -> Model:
        async with self._bodies.reading(request) as body:
            if len(body) < LARGE_BODY_BYTES:
                return parse_body(model, body)
            return await asyncio.to_thread(parse_body, model, body)

    async def _answer(self, request: Request, answer: Answer, stream: bool) -> Response:
        if not stream:
            return await _unless_client_leaves(request.receive, _collect(answer)) or CLIENT_LEFT
        # Before the status line is written, so that an early error has a status of its own, unless
        # it takes so long that somebody on the way may take the connection for dead.
        try:
            started = await _unless_client_leaves(request.receive, answer.start(FIRST_PIECE_S))
        except BaseException:
            await answer.close()
            raise
        if started is None:
            await answer.close()
            return CLIENT_LEFT
        return EventStream(started)


class EventStream(StreamingResponse):
    """An answer that was started, as server-sent events; closed however the sending ends."""

    def __init__(self, answer: Answer) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(answer.events(), media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # What Starlette does, without a task group, which takes longer than a first event.
            await _unless_client_leaves(receive, self.stream_response(send))
        except Exception as error:
            # Serve's ways to tell that the client has left, or that the proxy has ended.
            if not (is_cancellation(error) or is_actor_death(error)):
                raise
        finally:
            await self._answer.close()


def api_app(ingress: Ingress, lifespan: Lifespan) -> Starlette:
    """The ASGI application; `lifespan` runs around its life, before the first request."""

    def post(path: str, handler: Handler) -> Route:
        return Route(path, _answering_errors(handler), methods=["POST"])

    def get(path: str, handler: Handler) -> Route:
        return Route(path, _answering_errors(handler), methods=["GET"])

    routes = [
        post("/v1/completions", ingress.completions),
        post("/v1/chat/completions", ingress.chat_completions),
        get("/v1/models", ingress.list_models),
        get("/v1/models/{name:path}", ingress.get_model),
        post("/v1/load_lora_adapter", ingress.load_adapter),
        post("/v1/unload_lora_adapter", ingress.unload_adapter),
        get("/health", ingress.health),
    ]
    return Starlette(
        routes=routes, exception_handlers={HTTPException: _no_such_route}, lifespan=lifespan
    )


def _answering_errors(handler: Handler) -> Handler:
    """What a handler raises becomes its answer."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return CLIENT_LEFT
        except Exception as error:
            if is_cancellation(error):
                # Serve was the first to see that the client left.
                return CLIENT_LEFT
            return api_error(error, uuid.uuid4().hex).response()

    return answer


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return ApiError(error.status_code, message).response()


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")


async def _collect(answer: Answer) -> Response:
    return _json(await answer.collect())


async def _unless_client_leaves(receive: Receive, work: Awaitable[Result]) -> Result | None:
    """The result of `work`, which is cancelled if the client disconnects first: None then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
