"""Decides what each step computes: decodes, prompts beside them, preemption, finishing.

Owns the running set and every KV page; which request starts next is the waiting queue's to say,
and the prefill planner divides what a step has for prompts.
Never touches tensors: it returns a `StepPlan` and is told the sampled tokens by `commit`. Called by
the engine only, which may plan and launch a step before it commits the ones before.
"""

from collections.abc import Callable

from slora_core.adapters.residency import AdapterResidency
from slora_core.config import EngineConfig
from slora_core.errors import InvalidRequestError, SLoRAError
from slora_core.memory.eviction import EvictionQueue
from slora_core.memory.page_pool import PagePool, pages_for
from slora_core.memory.prefix_cache import PrefixCache
from slora_core.requests import FinishReason, RequestState, StepOutput, StepPlan
from slora_core.scheduling.admission import Admission
from slora_core.scheduling.prefill_budget import oldest_share
from slora_core.scheduling.prefill_planner import PrefillPlanner
from slora_core.scheduling.running_set import RunningSet
from slora_core.scheduling.waiting_queue import WaitingQueue


class Scheduler:
    """Continuous batching under a token budget.

    Running requests are kept in the order they were admitted. Decodes go first, then prompts,
    between which the prefill planner divides what is left. Where pages run out, idle adapters and
    prefixes are evicted, then, for a decode or the oldest prompt, the youngest running request is
    preempted: it starts anew later. The oldest running request is never preempted, so every step
    makes progress.

    A step is in flight from `schedule` to `commit`, in that order for all steps. What a request
    holds is given back only when no step in flight has a chunk of it: one that ends earlier drains,
    and a request is preempted only while no step is in flight.

    Args:
        adapter_pages: pages that the adapter of an id takes; asked only for registered adapters.
        eos_token_ids: end a request that does not ignore them.
        waiting: in which order requests start; empty.
    """

    def __init__(
        self,
        config: EngineConfig,
        pool: PagePool,
        queue: EvictionQueue,
        residency: AdapterResidency,
        prefixes: PrefixCache,
        adapter_pages: Callable[[str], int],
        eos_token_ids: tuple[int, ...],
        waiting: WaitingQueue,
    ) -> None:
        self._config = config
        self._pool = pool
        self._queue = queue
        self._adapter_pages = adapter_pages
        self._eos_token_ids = frozenset(eos_token_ids)
        self._waiting = waiting
        self._running = RunningSet(config, pool, queue, residency, prefixes)
        # Waiting and running ones.
        self._requests: dict[str, RequestState] = {}
        # Refused since they were queued, and not told yet.
        self._refused: dict[str, SLoRAError] = {}
        self._num_inflight = 0
        admission = Admission(config, pool, residency, prefixes, self._running, adapter_pages)
        self._admission = admission
        self._prefills = PrefillPlanner(config, self._running, waiting, admission, adapter_pages)
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs, or a refusal is still to be told."""
        return bool(self._requests or self._refused)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def running_ids(self) -> list[str]:
        """Of requests that hold pages, in the order of their admission."""
        return [request.request_id for request in self._running]

    @property
    def num_cached_prompt_tokens(self) -> int:
        return self._running.num_cached_prompt_tokens

    def check_fits(self, request: RequestState) -> None:
        """Raises InvalidRequestError where it and its adapter could never fit the pool together."""
        needed = pages_for(request.max_total_tokens, self._config.page_tokens)
        adapter = self._adapter_pages(request.adapter_id) if request.adapter_id else 0
        if needed + adapter > self._pool.num_pages:
            raise InvalidRequestError(
                f"prompt and max_tokens of {request.max_total_tokens} tokens need {needed} pages "
                f"and the adapter {adapter}; the pool has {self._pool.num_pages} pages of "
                f"{self._config.page_tokens} tokens",
                "max_tokens",
            )

    def add(self, request: RequestState) -> None:
        """Queue a request; raises as `check_fits`."""
        self.check_fits(request)
        assert request.request_id not in self._requests, f"{request.request_id} is queued already"
        self._requests[request.request_id] = request
        self._waiting.add(request)

    def abort(self, request_id: str) -> bool:
        """Remove a request wherever it is; False where it is unknown or has ended already."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        if request_id in self._running:
            self._running.end(request)
        else:
            self._waiting.remove(request)
            request.ended = True
        return True

    def refuse(self, request_id: str, error: SLoRAError) -> bool:
        """End a request that was queued, for a reason that its client is told; as `abort`."""
        if not self.abort(request_id):
            return False
        self._refused[request_id] = error
        return True

    def take_refused(self) -> dict[str, SLoRAError]:
        """What clients have to be told of requests refused since the last call, by request id."""
        refused, self._refused = self._refused, {}
        return refused

    def schedule(self) -> StepPlan:
        """Plan one step, as if all steps in flight had run.

        An empty plan means that nothing can run before a step in flight is committed, or at all.
        A blocked one was cut short: no more can be planned until all steps in flight, itself
        included, are committed.
        """
        plan = StepPlan()
        self._admission.begin_step()
        decodes, oldest = self._grow_running(plan)
        for request in decodes:
            self._running.compute(plan, request, request.num_tokens)
        if not plan.blocked:
            budget = self._config.max_batched_tokens - len(decodes)
            self._prefills.schedule(plan, budget, oldest)
        plan.sort()
        self._num_inflight += bool(plan.chunks)
        return plan

    def commit(self, plan: StepPlan, token_ids: list[int]) -> StepOutput:
        """Take the tokens of the oldest step in flight; returns those of requests that went on.

        Args:
            token_ids: the sampled token of each chunk that samples, in the plan's order.
        """
        self._num_inflight -= 1
        output = StepOutput()
        tokens = iter(token_ids)
        for chunk in plan.chunks:
            request = chunk.request
            request.num_inflight -= 1
            if chunk.samples:
                request.num_pending -= 1
                token_id = next(tokens)
            if request.ended:
                self._running.settle(request)
            elif chunk.samples:
                request.output_ids.append(token_id)
                reason = self._finish_reason(request, token_id)
                if reason is not None:
                    del self._requests[request.request_id]
                    self._running.end(request)
                output.add(request.request_id, token_id, reason)
                if request.num_cached_tokens and chunk.token_index == 0:
                    output.cached_tokens[request.request_id] = request.num_cached_tokens
        return output

    def abandon(self, plan: StepPlan) -> None:
        """Take back the one step in flight, which failed before it ran.

        All running requests wait again, and start anew: what the step was to compute or to copy,
        others may have found in the caches.
        """
        self._num_inflight -= 1
        assert not self._num_inflight, "steps before it must be committed"
        for chunk in plan.chunks:
            request = chunk.request
            request.num_inflight -= 1
            request.num_pending -= chunk.samples
            if request.ended:
                self._running.settle(request)
        for request in reversed([*self._running]):
            self._running.preempt(request)
            self._waiting.put_back(request)
        # Copies are also planned for requests that wait for their first chunk.
        copied = {load.adapter_id for load in plan.adapter_loads}
        self._running.forget({chunk.request.adapter_id for chunk in plan.chunks} | copied)

    def take_waiting(self) -> list[RequestState]:
        """Let go of all waiting requests, in the order in which they would start."""
        taken = []
        while (request := self._waiting.head()) is not None:
            self._waiting.remove(request)
            del self._requests[request.request_id]
            taken.append(request)
        return taken

    def check_integrity(self) -> None:
        """Assert that every page and table index has one owner, and every request one place."""
        self._running.check_integrity(self._num_inflight)
        for request in self._waiting:
            assert not request.page_ids and request.table_idx == -1
            assert not request.num_computed and not request.num_inflight
        assert len(self._requests) == len(self._waiting) + len(self._running)

    def _grow_running(self, plan: StepPlan) -> tuple[list[RequestState], RequestState | None]:
        """Give running requests pages for what they compute in this step, oldest first.

        Returns those that decode, and the oldest one within its prompt, which has pages for its
        share of the step's prompt tokens. All that decode or, where one finds no pages before the
        steps in flight are committed, none: a step of a few costs nearly as much as one of all.
        Pages that some got by then are theirs in the next step.
        """
        decodes: list[RequestState] = []
        oldest = None
        for request in self._running:
            # One preempted by an older request in this loop has left the running set.
            if request.table_idx < 0 or request.awaits_last_token:
                continue
            if request.num_uncomputed > 1:
                if oldest is None:
                    oldest = request
                    self._grow(plan, request, self._end_of_share(request))
            elif len(decodes) < self._config.max_batched_tokens:
                if self._grow(plan, request, request.num_tokens):
                    decodes.append(request)
                elif plan.blocked:
                    return [], None
        return decodes, oldest if oldest is not None and oldest.table_idx >= 0 else None

    def _end_of_share(self, request: RequestState) -> int:
        """Up to where this step computes the oldest prompt, whoever else wants tokens."""
        self._running.find_prefix(request)
        num_decodes = sum(r.num_uncomputed == 1 and not r.awaits_last_token for r in self._running)
        budget = max(0, self._config.max_batched_tokens - num_decodes)
        share = oldest_share(budget, self._config.shared_prefill_fraction)
        return request.num_computed + min(share, request.num_uncomputed)

    def _grow(self, plan: StepPlan, request: RequestState, num_tokens: int) -> bool:
        """Make the block table cover `num_tokens`, evicting and preempting where it must.

        The youngest running requests are preempted, at last `request` itself (False). Requests
        grow oldest first and before any is in the step's plan, so none that is in it is preempted.
        While steps in flight hold what is missing the plan is marked as blocked instead (False).
        """
        missing = pages_for(num_tokens, self._config.page_tokens) - len(request.page_ids)
        if missing <= 0:
            return True
        self._queue.make_room(missing)
        while not self._pool.can_allocate(missing):
            if self._num_inflight:
                plan.blocked = True
                return False
            youngest = self._running.youngest
            self._running.preempt(youngest)
            self.num_preemptions += 1
            self._waiting.put_back(youngest)
            if youngest is request:
                return False
            # Its full pages are a prefix now, and its adapter may be idle.
            self._queue.make_room(missing)
        self._running.cover(request, num_tokens)
        return True

    def _finish_reason(self, request: RequestState, token_id: int) -> FinishReason | None:
        sampling = request.sampling
        num_output = len(request.output_ids)
        # Until then ends were masked; where that left no token at all, the sampler gave one still.
        if num_output > sampling.min_tokens:
            if token_id in self._eos_token_ids and not sampling.ignore_eos:
                return FinishReason.STOP
            if token_id in sampling.stop_token_ids:
                return FinishReason.STOP
        if num_output >= sampling.max_tokens:
            return FinishReason.LENGTH
        return None
