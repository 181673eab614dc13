"""The engine replica: an actor that moves messages between Serve and an engine process.

Owns the engine, the leases of the adapters that it runs and what the replica tells Serve of
itself. It never touches a tensor or a text; `generation.client` calls `generate`.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import Any

import ray
from ray import serve

from app import in_place, ray_private
from app.args import SLoRAArgs
from app.models.source import resolve_model
from app.registry.client import RegistryClient
from app.registry.follower import RegistryView
from app.registry.pools import REPORT_EVERY_S
from app.registry.state import AdapterRecord
from app.replica.leases import AdapterLeases
from app.replica.left_requests import LeftRequests
from app.replica.load_meter import LoadMeter
from app.replica.spans import ReplicaSpans
from app.replica.warm_up import (
    PeerHeat,
    adapters_to_warm,
    hear_hot_adapters,
    load_adapter,
    warm_up,
)
from app.routing.view import HEALTHY_KEY, MODEL_KEY, QUEUE_LEN_KEY, RANK_KEY
from app.serve_log import log_with_serve
from app.serve_run import ended_by_failure, started
from app.store.client import StoreClient
from app.tracing.spans import tracing_of
from slora_core.engine.process import AsyncEngine
from slora_core.engine.protocol import EngineSpec
from slora_core.errors import EngineDeadError, OverloadedError, SLoRAError
from slora_core.requests import Delta, Request

logger = logging.getLogger(__name__)

# Seconds in which another base model's ingress takes over, as clients are told.
MODEL_CHANGE_S = 5
# Seconds that the last deltas have to leave this process.
LAST_WORDS_S = 0.2
# And its spans, which tell of the death.
LAST_SPANS_S = 1.0
# Seconds between two looks at the pages that a busy engine has free.
PAGES_EVERY_S = 0.5


class EngineServer:
    """One replica, in an actor that Serve makes and asks for its health and load."""

    async def __init__(self, args: SLoRAArgs, registry: Any) -> None:  # type: ignore[misc]
        log_with_serve()
        with ended_by_failure():
            await self._start(args, registry)
            started()

    async def _start(self, args: SLoRAArgs, registry: Any) -> None:
        self._args = args
        context = serve.get_replica_context()
        self._replica_id = context.replica_id.unique_id
        self._tracing = tracing_of("engine")
        self._spans = ReplicaSpans(self._tracing, self._replica_id)
        # Whether Serve ends this replica.
        self._is_stopped = False
        # Before the engine, so that both start at once.
        store = StoreClient(args)
        self._left = LeftRequests()
        self._meter = LoadMeter(self._replica_id, args.page_tokens)
        self._engine = self._new_engine(args)
        started_at = time.monotonic()
        info = await self._engine.start()
        logger.info(
            "engine process %s has %s pages after %.1f s",
            info.pid,
            info.num_pages,
            time.monotonic() - started_at,
        )
        self._pid = info.pid
        self._num_pages = info.num_pages
        self._registry = RegistryClient(registry)
        view = RegistryView(self._registry, self._drop_adapters)
        await view.refresh()
        # No request should wait for the store's start.
        await store.stats()
        self._leases = AdapterLeases(store, self._engine, info.pid, view.has_id)
        self._following = asyncio.create_task(view.follow())
        self._reporting = asyncio.create_task(self._report_pool())
        self._ending = asyncio.create_task(self._end_with_engine())
        self._looking = asyncio.create_task(self._look_at_pages())
        if args.most_replicas > 1:
            await self._load_hot_adapters()

    def reconfigure(self, changed: dict[str, Any]) -> None:
        """Called by Serve, also after the start; see `in_place.settings`."""
        self._args = in_place.with_settings(self._args, changed)

    def _new_engine(self, args: SLoRAArgs) -> AsyncEngine:
        """The engine, not started; benchmarks have replicas with another one."""
        return AsyncEngine(engine_spec(args), self._interval, self._left.left)

    async def generate(
        self,
        request: Request,
        record: AdapterRecord | None = None,
        avoid_replica: str | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of one request; every error that is somebody's input is in the last one.

        `record` is of the request's adapter, also where it was unloaded since. `avoid_replica` is
        for the router, which has read it.
        """
        try:
            self._check_model(request)
            spans = self._spans
            holding = spans.leasing(request, self._leases.hold(record)) if record else nullcontext()
            with self._meter.counted(request, record) as with_load:
                async with holding:
                    with self._engine.generate(request) as stream, spans.running(request, stream):
                        if request.num_moves:
                            # Its client waits for an engine no longer, but for this one's queue.
                            yield Delta(request.request_id, [])
                        async for delta in stream:
                            if delta.error is not None:
                                # Also for the lease, which may have to be replaced.
                                raise delta.error
                            yield with_load(delta)
        except EngineDeadError as error:
            told = EngineDeadError(str(error), self._replica_id, error.is_suspect)
            yield Delta(request.request_id, [], error=told)
        except SLoRAError as error:
            yield Delta(request.request_id, [], error=error)

    async def is_alive(self) -> bool:
        return self._engine.is_alive()

    async def stats(self) -> dict[str, Any]:
        """The engine's counters, and which replica and process they are of."""
        stats = asdict(await self._engine.stats())
        # The engine counts whatever was left as aborted.
        stats["num_finished"] += self._left.num_ended_by_text
        stats["num_aborted"] -= self._left.num_ended_by_text
        identity = {
            "replica_id": self._replica_id,
            "rank_in_deployment": self._rank(),
            "replica_pid": os.getpid(),
        }
        return {**identity, "engine_pid": self._pid, **stats}

    async def ended_by_text(self, request_ids: list[str]) -> None:
        """Called by every ingress; see `LeftRequests`."""
        self._left.ended_by_text(request_ids)

    async def check_integrity(self) -> None:
        """Raises AssertionError if the engine's pool has lost a page."""
        await self._engine.check_integrity()

    async def check_health(self) -> None:
        """Called by Serve; an error makes it replace the replica."""
        if not self._engine.is_alive():
            raise RuntimeError("the engine process ended")

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve; what `serve_router` reads."""
        return {
            RANK_KEY: self._rank(),
            HEALTHY_KEY: self._engine.is_alive(),
            QUEUE_LEN_KEY: self._meter.coarse_num_requests,
            MODEL_KEY: in_place.model_key(self._args),
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve; what `routing.autoscaling` reads."""
        return self._meter.autoscaling_stats()

    async def hot_adapters(self) -> PeerHeat:
        """Called by a replica that starts."""
        return PeerHeat(self._rank(), self._meter.heat.hottest())

    def __del__(self) -> None:
        # Serve calls it at a graceful stop, also where __init__ failed.
        self._is_stopped = True
        if hasattr(self, "_engine"):
            self._engine.close()
            self._tracing.close()

    def _rank(self) -> str:
        # Serve may renumber replicas when it removes some, so it is read anew each time.
        return str(serve.get_replica_context().rank.rank)

    def _check_model(self, request: Request) -> None:
        """Raises OverloadedError for a prompt that another base model's ingress has tokenized.

        While a deployment of another model is under way, old processes are there beside new ones.
        """
        if request.model_key not in ("", in_place.model_key(self._args)):
            raise OverloadedError(
                "the base model is being replaced; try again in a few seconds", MODEL_CHANGE_S
            )

    async def _end_with_engine(self) -> None:
        """End this actor once its engine has died and its clients know.

        Serve replaces an actor that has ended within a second, and one that says of itself that it
        is not well only after three checks.
        """
        await self._engine.wait_dead()
        await asyncio.sleep(LAST_WORDS_S)
        if self._is_stopped:
            return
        logger.error("the engine has died, and so does its replica")
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(self._tracing.close), LAST_SPANS_S)
        ray.kill(ray.get_runtime_context().current_actor)

    def _interval(self, num_streams: int) -> float:
        return gathering_interval(self._args)(num_streams)

    async def _report_pool(self) -> None:
        """Tell the registry of this engine's pool, for as long as there is one."""
        while self._engine.is_alive():
            try:
                await self._registry.report_pool(self._replica_id, self._num_pages)
            except Exception as error:
                # It may be away for a while; the next report makes up for this one.
                logger.info("the registry was not told of the pool: %r", error)
            await asyncio.sleep(REPORT_EVERY_S)

    async def _look_at_pages(self) -> None:
        """Keep the meter told of the engine's pages, while they change."""
        while self._engine.is_alive():
            if self._meter.needs_pages:
                with suppress(EngineDeadError):
                    self._meter.saw_pages(await self._engine.stats())
            await asyncio.sleep(PAGES_EVERY_S)

    async def _load_hot_adapters(self) -> None:
        """Load what will be asked for here, before Serve sends requests."""
        context = serve.get_replica_context()
        peers = ray_private.handle_by_name(context.deployment, context.app_name)
        hot = await hear_hot_adapters(
            lambda: peers.broadcast("hot_adapters").results_async(return_exceptions=True)
        )
        records = adapters_to_warm(self._rank(), hot, self._num_pages)
        await warm_up(records, lambda record: load_adapter(record, self._leases, self._engine))

    def _drop_adapters(self, adapter_ids: frozenset[str]) -> None:
        for adapter_id in adapter_ids:
            self._engine.drop_adapter(adapter_id)


def gathering_interval(args: SLoRAArgs) -> Callable[[int], float]:
    """Seconds between two deltas of a stream, by their number: all together are not too many."""
    return lambda num_streams: max(args.flush_interval_s, num_streams / args.max_pieces_per_s)


def engine_spec(args: SLoRAArgs) -> EngineSpec:
    """What an engine process of these arguments is started with."""
    num_threads = args.num_threads
    if num_threads is None and args.device == "cpu":
        # Replicas share the machine; more threads than cores make each of them slower.
        num_threads = max(1, len(os.sched_getaffinity(0)) // args.most_replicas)
    return EngineSpec(
        model_path=str(resolve_model(args.model, args.model_revision)),
        load_format=args.load_format,
        engine=args.engine_config(),
        num_threads=num_threads,
        stall_s=args.stall_timeout_s,
    )
