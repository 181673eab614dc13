"""Decides what each step computes: admission, chunked prefill, preemption, finishing.

Owns the waiting queue, the running set and every KV page. Never touches tensors: it returns a
`StepPlan` and is told the sampled tokens by `commit`. Called by the engine between steps only.
"""

from collections import deque
from collections.abc import Callable

from slora_core.adapters.residency import AdapterResidency
from slora_core.config import EngineConfig
from slora_core.errors import InvalidRequestError
from slora_core.memory.page_pool import PageOwner, PagePool
from slora_core.memory.sizing import pages_for
from slora_core.scheduling.admission import peak_kv_pages
from slora_core.types import (
    FinishReason,
    Request,
    RequestOutput,
    StepPlan,
)


class Scheduler:
    """First come, first served, under a token budget.

    Running requests are kept in the order they were admitted. Decodes go first, then prefill
    chunks of running requests, then the head of the waiting queue. Where pages run out, idle
    adapters are evicted, then the youngest running request is preempted: its KV is freed and
    recomputed later. The oldest running request is never preempted, so every step makes progress.

    Args:
        adapter_pages: pages that the adapter of an id takes; asked only for registered adapters.
        eos_token_ids: end a request that does not ignore them.
    """

    def __init__(
        self,
        config: EngineConfig,
        pool: PagePool,
        residency: AdapterResidency,
        adapter_pages: Callable[[str], int],
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._config = config
        self._pool = pool
        self._residency = residency
        self._adapter_pages = adapter_pages
        self._eos_token_ids = frozenset(eos_token_ids)
        self._waiting: deque[Request] = deque()
        # In the order of admission: the oldest first.
        self._running: dict[str, Request] = {}
        self._requests: dict[str, Request] = {}
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: it and its adapter could never fit the pool together.
        """
        needed = pages_for(request.max_total_tokens, self._config.page_tokens)
        adapter = self._adapter_pages(request.adapter_id) if request.adapter_id else 0
        if needed + adapter > self._pool.num_pages:
            raise InvalidRequestError(
                f"prompt and max_tokens of {request.max_total_tokens} tokens need {needed} pages "
                f"and the adapter {adapter}; the pool has {self._pool.num_pages} pages of "
                f"{self._config.page_tokens} tokens",
                "max_tokens",
            )
        assert request.request_id not in self._requests, f"{request.request_id} is queued already"
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def abort(self, request_id: str) -> bool:
        """Remove a request wherever it is; False where it is unknown or has ended already."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        if self._running.pop(request_id, None) is not None:
            self._release(request)
        else:
            self._waiting.remove(request)
        return True

    def schedule(self) -> StepPlan:
        """Plan one step; an empty plan means that nothing can run."""
        plan = StepPlan()
        budget = self._schedule_decodes(plan, self._config.max_batched_tokens)
        budget = self._schedule_prefills(plan, budget)
        self._admit(plan, budget)
        plan.sort()
        return plan

    def commit(self, plan: StepPlan, token_ids: list[int]) -> list[RequestOutput]:
        """Advance the requests of a plan that ran.

        Args:
            token_ids: the sampled token of each chunk that samples, in the plan's order.
        """
        outputs = []
        tokens = iter(token_ids)
        for chunk in plan.chunks:
            request = chunk.request
            request.num_computed = chunk.end
            if not chunk.samples:
                continue
            token_id = next(tokens)
            request.output_ids.append(token_id)
            reason = self._finish_reason(request, token_id)
            if reason is not None:
                self._finish(request)
            outputs.append(RequestOutput(request.request_id, [token_id], reason))
        return outputs

    def check_integrity(self) -> None:
        """Assert that every page has one owner and that block tables cover what is computed."""
        held = [page_id for request in self._running.values() for page_id in request.page_ids]
        self._pool.check_integrity(held, self._residency.page_ids())
        for request in self._waiting:
            assert not request.page_ids and request.num_computed == 0
        for request in self._running.values():
            computed = pages_for(request.num_computed, self._config.page_tokens)
            assert len(request.page_ids) >= computed
        assert len(self._requests) == len(self._waiting) + len(self._running)

    def _schedule_decodes(self, plan: StepPlan, budget: int) -> int:
        """One token of every running request that has just one to compute; returns what is left."""
        for request in list(self._running.values()):
            if budget == 0:
                break
            # One preempted by an older request in this loop has left the running set.
            if request.num_uncomputed != 1 or request.request_id not in self._running:
                continue
            if self._grow(request, request.num_tokens):
                plan.add(request, request.num_tokens)
                budget -= 1
        return budget

    def _schedule_prefills(self, plan: StepPlan, budget: int) -> int:
        """A chunk of every running request that has more to compute, within the budget."""
        for request in list(self._running.values()):
            if budget == 0:
                break
            if request.request_id in plan.scheduled or request.request_id not in self._running:
                continue
            end = request.num_computed + min(budget, request.num_uncomputed)
            if self._grow(request, end):
                budget -= end - request.num_computed
                plan.add(request, end)
        return budget

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Start waiting requests, strictly in order, while each fits to its expected end."""
        while self._waiting and budget and self.num_running < self._config.max_running_requests:
            request = self._waiting[0]
            if not self._fits(request):
                break
            self._waiting.popleft()
            if request.adapter_id is not None:
                request.adapter_slot, load = self._residency.acquire(
                    request.adapter_id, self._adapter_pages(request.adapter_id)
                )
                if load is not None:
                    plan.adapter_loads.append(load)
            self._running[request.request_id] = request
            end = min(budget, request.num_uncomputed)
            grown = self._grow(request, end)
            assert grown, "_fits counted the pages"
            plan.add(request, end)
            budget -= end

    def _fits(self, request: Request) -> bool:
        """Whether the head of the queue will, by estimate, run to its end beside the others."""
        adapter_id = request.adapter_id
        new_pinned = 0
        if adapter_id is not None:
            if not self._residency.can_acquire(adapter_id):
                return False
            if not self._residency.is_pinned(adapter_id):
                new_pinned = self._adapter_pages(adapter_id)
        if not self._running:
            # Alone it fits to the end: `add` made sure.
            return True
        # The peak counts what each holds now, so what fits by it can also start now.
        peak = peak_kv_pages([*self._running.values(), request], self._config)
        return peak + self._residency.num_pinned_pages + new_pinned <= self._pool.num_pages

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Make the block table cover `num_tokens`, evicting and preempting where it must.

        The youngest running requests are preempted, at last `request` itself (False). Requests
        are planned oldest first and only the youngest can be within its prompt, so none that is
        in the step's plan already is preempted.
        """
        missing = pages_for(num_tokens, self._config.page_tokens) - len(request.page_ids)
        if missing <= 0:
            return True
        self._residency.make_room(missing)
        while not self._pool.can_allocate(missing):
            youngest = next(reversed(self._running.values()))
            self._preempt(youngest)
            if youngest is request:
                return False
            # The adapter of the preempted request may be idle now.
            self._residency.make_room(missing)
        request.page_ids += self._pool.allocate(missing, PageOwner.KV)
        return True

    def _preempt(self, request: Request) -> None:
        """Free a running request and put it at the head of the queue, to be recomputed."""
        del self._running[request.request_id]
        self._release(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.appendleft(request)

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        params = request.params
        if token_id in self._eos_token_ids and not params.ignore_eos:
            return FinishReason.STOP
        if token_id in params.stop_token_ids:
            return FinishReason.STOP
        if len(request.output_ids) >= params.max_tokens:
            return FinishReason.LENGTH
        return None

    def _finish(self, request: Request) -> None:
        del self._running[request.request_id]
        del self._requests[request.request_id]
        self._release(request)

    def _release(self, request: Request) -> None:
        self._pool.free(request.page_ids)
        request.page_ids = []
        if request.adapter_id is not None:
            self._residency.release(request.adapter_id)
            request.adapter_slot = None
