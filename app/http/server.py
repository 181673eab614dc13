"""The ingress deployment: `routes.Ingress` in a Serve replica.

Owns what the ASGI application is made of and its life: the tokenizer, the copy of the registry,
the handles. No logic of requests lives here.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette

from app import in_place, ray_private
from app.args import SLoRAArgs
from app.generation.backlog import Backlog
from app.generation.client import EngineClient
from app.http.bodies import BodyReader
from app.http.limits import ModelLimits
from app.http.routes import Ingress, api_app
from app.http.service import CompletionService
from app.interrupts import interrupts
from app.models.source import resolve_model
from app.registry.client import RegistryClient
from app.registry.follower import RegistryView
from app.serve_log import log_with_serve
from app.serve_run import ended_by_failure
from app.tracing.spans import Tracing, tracing_of
from slora_core.models.generation_defaults import OPENAI_DEFAULTS, GenerationDefaults
from slora_core.models.registry import load_generation_defaults, load_model_config
from slora_core.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# How long /health waits for an engine replica and believes its last answer, seconds.
READY_TIMEOUT_S = 2.0
READY_CACHE_S = 1.0
# Within so long after an interrupt the server is gone, or it was meant for another process.
INTERRUPTED_S = 30.0


@ray_private.ingress_built_in_replica
class IngressServer:
    """Takes HTTP requests; any number of them serve the same engine replicas."""

    def __init__(self, args: SLoRAArgs, engine: Any, registry: Any) -> None:
        log_with_serve()
        self._args = args
        self._engine = engine
        self._registry = RegistryClient(registry)
        self._view = RegistryView(self._registry)
        self._ready = (False, -READY_CACHE_S)
        self._bodies = BodyReader(*_body_limits(args))
        self._backlog = Backlog(args.max_queued_requests, args.num_queued_tokens)

    def reconfigure(self, changed: dict[str, Any]) -> None:
        """Called by Serve, also after the start; see `in_place.settings`."""
        args = in_place.with_settings(self._args, changed)
        self._bodies.set_limits(*_body_limits(args))
        self._backlog.set_limits(args.max_queued_requests, args.num_queued_tokens)

    def build_asgi_app(self) -> Starlette:
        with ended_by_failure():
            return self._api_app()

    def _api_app(self) -> Starlette:
        args = self._args
        model_dir = resolve_model(args.model, args.model_revision)
        tracing = tracing_of("ingress")
        client = EngineClient(
            self._engine, self._backlog, args.failover_timeout_s, in_place.model_key(args)
        )
        service = CompletionService(
            args.base_model_name,
            args.model or args.base_model_name,
            model_limits(args),
            Tokenizer(model_dir, args.chat_template),
            self._view,
            client,
            sampling_defaults(args),
            args.model_revision,
            tracing,
        )
        check_room = self._backlog.check_room
        ingress = Ingress(service, self._registry, self._is_ready, self._bodies, check_room)
        return api_app(ingress, lambda app: self._lifespan(client, tracing), tracing)

    @asynccontextmanager
    async def _lifespan(self, client: EngineClient, tracing: Tracing) -> AsyncIterator[None]:
        await self._view.refresh()
        tasks = [
            asyncio.create_task(self._view.follow()),
            asyncio.create_task(_end_streams_at_interrupts(client)),
        ]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.to_thread(tracing.close)

    async def _is_ready(self) -> bool:
        """Whether some replica has a living engine; asks them at most once a second.

        Where the last one may go for want of requests, also without: the next request starts one.
        """
        is_ready, asked_at = self._ready
        if time.monotonic() - asked_at >= READY_CACHE_S:
            try:
                answers = self._engine.broadcast("is_alive").results_async(return_exceptions=True)
                is_ready = True in await asyncio.wait_for(answers, READY_TIMEOUT_S)
            except TimeoutError:
                # Replicas are there but full: the call waits behind requests. One that hangs is
                # found by Serve's own check, which does not wait.
                is_ready = True
            except Exception:
                # There is no replica.
                is_ready = self._args.least_replicas == 0
            self._ready = (is_ready, time.monotonic())
        return is_ready


async def _end_streams_at_interrupts(client: EngineClient) -> None:
    """Ctrl-C at `serve run` is told to clients while there are connections to tell it."""
    async for _ in interrupts():
        logger.info("the server is being stopped")
        client.stop()
        await asyncio.sleep(INTERRUPTED_S)
        client.go_on()


def _body_limits(args: SLoRAArgs) -> tuple[int, float, int]:
    return args.max_body_bytes, args.body_timeout_s, args.max_inflight_body_bytes


def model_limits(args: SLoRAArgs) -> ModelLimits:
    """What the model and these arguments allow."""
    model = load_model_config(resolve_model(args.model, args.model_revision))
    engine = args.engine_config()
    return ModelLimits(
        context_len=engine.context_len(model),
        vocab_size=model.vocab_size,
        eos_token_ids=frozenset(model.eos_token_ids),
        page_tokens=engine.page_tokens,
    )


def sampling_defaults(args: SLoRAArgs) -> GenerationDefaults:
    """What the model's files, or OpenAI's API, have where a request is silent."""
    if args.generation_config == "openai":
        return OPENAI_DEFAULTS
    return load_generation_defaults(resolve_model(args.model, args.model_revision))
