"""The engine: plan, launch, commit. Synchronous, in-process, without Ray.

Owns one scheduler, one pool and one model runner. `engine.main` drives it from a queue of
messages; tests and offline benchmarks call it directly.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from slora_core.adapters.page_layout import AdapterGeometry, PackedAdapter
from slora_core.adapters.residency import AdapterResidency
from slora_core.config import EngineConfig
from slora_core.dtypes import torch_dtype
from slora_core.engine.recovery import Recovery, StepFailedError
from slora_core.engine.request_checks import check_request
from slora_core.errors import AdapterNotFoundError, AdapterTooLargeError, SLoRAError
from slora_core.execution.memory_profile import profile_num_pages
from slora_core.execution.model_runner import ModelRunner
from slora_core.execution.step_builder import StepBuilder
from slora_core.execution.step_handle import StepHandle
from slora_core.execution.warm_up import capture_graphs, compile_kernels
from slora_core.memory.eviction import EvictionQueue
from slora_core.memory.page_pool import PageOwner, PagePool
from slora_core.memory.prefix_cache import PrefixCache
from slora_core.models.config import ModelConfig
from slora_core.models.registry import load_model_config
from slora_core.models.weights import DecoderWeights, dummy_weights, load_weights
from slora_core.requests import Request, RequestState, StepOutput, StepPlan
from slora_core.scheduling.scheduler import Scheduler
from slora_core.scheduling.waiting_queue import FirstComeQueue, WaitingQueue
from slora_core.stage_timer import StageTimer
from slora_core.stats import EngineStats

logger = logging.getLogger(__name__)

# Slots are only table rows; more of them than pages could never be in use.
MAX_ADAPTER_SLOTS = 4096


class Engine:
    """Args:
    ops: the kernel module, as of `ModelRunner`; None takes the device's.
    waiting: in which order requests start, empty; None is first come, first served.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        weights: DecoderWeights,
        ops: ModuleType | None = None,
        waiting: WaitingQueue | None = None,
    ) -> None:
        stages = StageTimer()
        if config.num_pool_tokens is None:
            with stages.measure("profile"):
                num_pages = profile_num_pages(model, config, weights)
            config = replace(config, num_pool_tokens=num_pages * config.page_tokens)
        self.model = model
        self.config = config
        self.geometry = AdapterGeometry.of(model, config)
        max_slots = min(config.num_pages, MAX_ADAPTER_SLOTS)
        with stages.measure("pool"):
            self.runner = ModelRunner(model, config, weights, max_slots, ops)
            self.builder = StepBuilder(model, config, self.runner.attention_planner)
        if config.device == "cuda":
            with stages.measure("kernels"):
                compile_kernels(model, config, self.builder, self.runner)
        if self.builder.shapes.has_graphs:
            with stages.measure("graphs"):
                capture_graphs(self.builder, self.runner)
        # Seconds of each stage of the start, in order.
        self.startup_s = stages.seconds
        self._host_copies: dict[str, PackedAdapter] = {}
        self._pool = PagePool(config.num_pages)
        queue = EvictionQueue(self._pool)
        self._residency = AdapterResidency(self._pool, queue, max_slots)
        self._prefixes = PrefixCache(
            self._pool, queue, config.page_tokens, enabled=config.prefix_caching
        )
        self.scheduler = Scheduler(
            config,
            self._pool,
            queue,
            self._residency,
            self._prefixes,
            lambda adapter_id: self._host_copies[adapter_id].layout.num_pages,
            model.eos_token_ids,
            FirstComeQueue() if waiting is None else waiting,
        )
        self._recovery = Recovery(self.scheduler)
        # Told, before a step is launched, the ids of requests that are computed for the first time.
        self.on_begin: Callable[[list[str]], None] = lambda request_ids: None
        # The step planned last; None where that was begun and not done.
        self._planned: StepPlan | None = StepPlan()
        # Launched and not committed, the oldest first.
        self._inflight: deque[tuple[StepPlan, StepHandle]] = deque()
        self._num_finished = self._num_aborted = self._num_refused = self._num_steps = 0
        self._num_prompt_tokens = self._num_output_tokens = 0

    @classmethod
    def from_pretrained(
        cls, model_dir: Path, config: EngineConfig, *, load_format: str = "safetensors"
    ) -> "Engine":
        """An engine for a Hugging Face directory.

        `load_format` "dummy" needs the directory's config only and makes random weights.

        Raises:
            UnsupportedModelError: a model the decoder does not implement, or damaged weights.
            ValueError: an unknown load_format.
        """
        model = load_model_config(model_dir)
        dtype = torch_dtype(config.dtype)
        stages = StageTimer()
        with stages.measure("weights"):
            if load_format == "safetensors":
                weights = load_weights(model_dir, model, config.device, dtype)
            elif load_format == "dummy":
                weights = dummy_weights(model, config.device, dtype)
            else:
                raise ValueError(f"load_format is {load_format!r}; use 'safetensors' or 'dummy'")
        engine = cls(model, config, weights)
        engine.startup_s = {**stages.seconds, **engine.startup_s}
        return engine

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to launch or to commit."""
        return bool(self._inflight) or self.scheduler.has_work or self._recovery.is_going

    def step_request_ids(self) -> list[str]:
        """Requests of the steps that are launched, or were about to be."""
        if self._planned is None:
            return self.scheduler.running_ids()
        plans = [*(plan for plan, _ in self._inflight), self._planned]
        ids = (chunk.request.request_id for plan in plans for chunk in plan.chunks)
        return list(dict.fromkeys(ids))

    @property
    def has_late_graphs(self) -> bool:
        """Whether `capture_late_graph` has something to do."""
        return len(self.runner.late_graphs) > 0

    def capture_late_graph(self) -> None:
        """Capture one of the graphs that steps lacked, with nothing in flight; may take seconds.

        Where it fails, steps of its shape and of those still to be captured go on without one.

        Raises:
            torch.AcceleratorError: the device has failed with it.
        """
        assert not self._inflight
        shape = self.runner.late_graphs.next()
        try:
            self.runner.capture(self.builder.build_as([], shape))
        except Exception:
            logger.warning("no graph was captured of %s, and none will be", shape, exc_info=True)
            self.runner.late_graphs.stop()
            self.runner.synchronize()
        else:
            logger.info("captured a graph that the start had not: %s", shape)

    def add_adapter(self, adapter: PackedAdapter) -> None:
        """Make an adapter's host pages known; they are read until `release_adapter`.

        Raises:
            AdapterTooLargeError: it has more pages than the pool.
        """
        if adapter.layout.num_pages > self._pool.num_pages:
            raise AdapterTooLargeError(
                f"the adapter needs {adapter.layout.num_pages} pages; the pool has "
                f"{self._pool.num_pages}"
            )
        self._host_copies[adapter.adapter_id] = adapter

    def has_adapter(self, adapter_id: str) -> bool:
        """Whether an adapter's host pages are known: added, and not released since."""
        return adapter_id in self._host_copies

    def release_adapter(self, adapter_id: str) -> None:
        """Forget an adapter's host pages, which no request uses; its pool pages stay a cache.

        Waits for a step in flight that copies them.
        """
        for plan, handle in self._inflight:
            if any(load.adapter_id == adapter_id for load in plan.adapter_loads):
                handle.token_ids()
        self._host_copies.pop(adapter_id, None)

    def drop_adapter(self, adapter_id: str) -> None:
        """Free an unloaded adapter's pages and prefixes, once its running requests have ended."""
        self._residency.drop(adapter_id)
        self._prefixes.drop(adapter_id)

    def add_request(self, request: Request) -> RequestState:
        """Queue a request; what is returned shows how far it has come.

        Raises:
            InvalidRequestError: an empty prompt, a token outside the vocabulary, or more tokens
                than the context or the pool holds.
            AdapterNotFoundError: its adapter was not added.
        """
        check_request(request, self.model.vocab_size, self.config.context_len(self.model))
        if request.adapter_id is not None and not self.has_adapter(request.adapter_id):
            raise AdapterNotFoundError(f"no adapter {request.adapter_id!r} was added")
        state = RequestState(request)
        if self._recovery.takes(state):
            self.scheduler.check_fits(state)
            self._recovery.add(state)
        else:
            self.scheduler.add(state)
        self._num_prompt_tokens += state.num_tokens
        return state

    def abort(self, request_id: str) -> bool:
        """Stop a request; False if it has ended or was never added.

        What it holds is freed at once, or with the last step in flight that computes it.
        """
        self._recovery.give_back(request_id)
        aborted = self.scheduler.abort(request_id)
        self._num_aborted += aborted
        return aborted

    def refuse(self, request_id: str, error: SLoRAError) -> bool:
        """Stop a request for a reason that the next `step` returns; as `abort`."""
        self._recovery.give_back(request_id)
        return self.scheduler.refuse(request_id, error)

    def step(self) -> StepOutput:
        """Launch the next step and commit the oldest one once enough are in flight.

        Returns what all steps that were committed gave, and the requests refused since.
        """
        output = StepOutput()
        has_failed = False
        self._recovery.before_step()
        try:
            plan = self._launch()
            if plan.blocked:
                # With nothing in flight the scheduler can preempt.
                while self._inflight:
                    output.extend(self._commit())
                plan = self._launch()
        except StepFailedError as failure:
            # Its pages become others': nothing may write to them any more. Raises where it is the
            # device that has failed.
            self.runner.synchronize()
            while self._inflight:
                output.extend(self._commit())
            self._recovery.after_failure(failure)
            plan, has_failed = StepPlan(), True
        refused = self.scheduler.take_refused()
        self._num_refused += len(refused)
        output.endings.update(refused)
        can_go_on = self._inflight or has_failed or not self.has_work
        assert can_go_on, "requests wait and none can run"
        if self._inflight and (
            not plan.chunks or len(self._inflight) >= self.config.max_inflight_steps
        ):
            output.extend(self._commit())
        return output

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Run requests to their end together; the output token ids of each, offline use."""
        states = [self.add_request(request) for request in requests]
        while self.has_work:
            self.step()
        return [state.output_ids for state in states]

    def stats(self) -> EngineStats:
        pool, residency, scheduler = self._pool, self._residency, self.scheduler
        return EngineStats(
            num_waiting=scheduler.num_waiting + len(self._recovery),
            num_running=scheduler.num_running,
            num_pages=pool.num_pages,
            num_free_pages=pool.num_free,
            num_kv_pages=pool.num_owned(PageOwner.KV) - self._prefixes.num_idle_pages,
            num_idle_prefix_pages=self._prefixes.num_idle_pages,
            num_adapter_pages=pool.num_owned(PageOwner.ADAPTER),
            resident_adapters=tuple(residency.resident_ids()),
            num_adapter_loads=residency.num_loads,
            num_adapter_hits=residency.num_hits,
            num_adapter_evictions=residency.num_evictions,
            num_preemptions=scheduler.num_preemptions,
            num_finished=self._num_finished,
            num_aborted=self._num_aborted,
            num_refused=self._num_refused,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_prompt_tokens=scheduler.num_cached_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
        )

    def check_integrity(self) -> None:
        """Assert the pool's invariant: free + KV + adapter == total, one owner a page."""
        self.scheduler.check_integrity()

    def _launch(self) -> StepPlan:
        """Plan a step, and launch it if anything can run.

        Raises:
            StepFailedError: what was planned did not run.
        """
        self._planned = None
        plan = self._planned = self.scheduler.schedule()
        if plan.chunks:
            begun = [chunk.request for chunk in plan.chunks if not chunk.request.has_begun]
            for request in begun:
                request.has_begun = True
            if begun:
                self.on_begin([request.request_id for request in begun])
            self._inflight.append((plan, self._run(plan)))
        return plan

    def _run(self, plan: StepPlan) -> StepHandle:
        """Copy the adapters that a plan asks for, and start its step; raises as `_launch`."""
        copying: str | None = None
        try:
            for load in plan.adapter_loads:
                copying = load.adapter_id
                adapter = self._host_copies[copying]
                self.builder.shapes.adapter_loaded(load.slot, adapter.layout)
                self.runner.load_adapter(load, adapter)
            copying = None
            return self.runner.run(self.builder.build(plan.chunks))
        except Exception as error:
            raise StepFailedError(plan, error, copying) from error

    def _commit(self) -> StepOutput:
        """Take the tokens of the oldest step in flight, waiting for them."""
        plan, handle = self._inflight[0]
        output = self.scheduler.commit(plan, handle.token_ids())
        # Not before: what fails at it, on the device or here, is said to have failed in this step.
        self._inflight.popleft()
        self._num_steps += 1
        self._num_output_tokens += len(output.token_ids)
        self._num_finished += len(output.endings)
        return output
