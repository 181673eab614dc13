"""Decides which prompts a step computes, and how much of each: starts requests, shares the budget.

Which request starts next is the waiting queue's to say, and whether it fits admission's. It gives
pages that are free or idle, and preempts nobody: the scheduler does, for decodes and for the oldest
prompt, before it calls this once a step.
"""

from collections.abc import Callable

from slora_core.config import EngineConfig
from slora_core.requests import RequestState, StepPlan
from slora_core.scheduling.admission import Admission
from slora_core.scheduling.prefill_budget import RoomBeside, whole_pages
from slora_core.scheduling.running_set import RunningSet
from slora_core.scheduling.waiting_queue import WaitingQueue


class PrefillPlanner:
    """The oldest prompt first, and beside it, in a share of the budget, the shortest of the others.

    Requests start in the queue's order, whatever their length, and a long one may do so before any
    of its tokens is computed, so that shorter ones behind it can start too. Without a share all is
    first come, first served.

    A prompt whose next page the oldest is about to compute waits for it, and then has it from the
    prefix cache; for the same reason each prompt looks there before each of its chunks.
    """

    def __init__(
        self,
        config: EngineConfig,
        running: RunningSet,
        waiting: WaitingQueue,
        admission: Admission,
        adapter_pages: Callable[[str], int],
    ) -> None:
        self._fraction = config.shared_prefill_fraction
        self._page_tokens = config.page_tokens
        self._running = running
        self._waiting = waiting
        self._admission = admission
        self._adapter_pages = adapter_pages

    def schedule(self, plan: StepPlan, budget: int, oldest: RequestState | None) -> None:
        """Plan prompts within `budget`.

        Args:
            oldest: of the running requests within their prompt; it has pages for its share.
        """
        if not budget:
            return
        if oldest is None:
            oldest = self._start_next(plan)
        if oldest is None:
            return
        if self._fraction:
            budget -= self._share(plan, oldest, budget)
        num_tokens = self._compute(plan, oldest, budget)
        assert num_tokens, "its share was given pages, or `fits` counted them"
        budget -= num_tokens
        self._go_on_in_order(plan, budget)

    def _share(self, plan: StepPlan, oldest: RequestState, budget: int) -> int:
        """Chunks of prompts behind the oldest, the shortest first; returns their tokens."""
        room = RoomBeside.of(oldest.num_uncomputed, budget, self._fraction)
        others = [r for r in self._within_prompts(plan) if r is not oldest]
        for request in others:
            self._find_prefix(request)
        others = [r for r in others if not self._running.awaits(r, oldest)]
        lengths = [request.num_uncomputed for request in others]
        while not room.is_filled_by(lengths) and (started := self._start_next(plan)) is not None:
            if not self._running.awaits(started, oldest):
                others.append(started)
                lengths.append(started.num_uncomputed)
        left = room.num_tokens
        for request in sorted(others, key=lambda request: request.num_uncomputed):
            if not left or not room.admits(request.num_uncomputed):
                break
            # One before it may have computed what they share.
            self._find_prefix(request)
            left -= self._compute(plan, request, self._part(request, left))
            if request.num_uncomputed > 1:
                break
        return room.num_tokens - left

    def _go_on_in_order(self, plan: StepPlan, budget: int) -> None:
        """What the oldest prompt leaves, first come, first served."""
        if not budget:
            return
        for request in self._within_prompts(plan):
            self._find_prefix(request)
            budget -= self._compute(plan, request, self._part(request, budget))
            if not budget or request.num_uncomputed > 1:
                return
        while budget and (started := self._start_next(plan)) is not None:
            budget -= self._compute(plan, started, self._part(started, budget))
            if started.num_uncomputed > 1:
                return

    def _within_prompts(self, plan: StepPlan) -> list[RequestState]:
        """Running requests, the oldest first, that have more than a token to compute and no chunk.

        Whose prompt has one token left is computed as a decode is.
        """
        within = [request for request in self._running if request.num_uncomputed > 1]
        if not within:
            return within
        planned = {chunk.request for chunk in plan.chunks}
        return [request for request in within if request not in planned]

    def _start_next(self, plan: StepPlan) -> RequestState | None:
        """Start the head of the queue if it fits to its expected end."""
        request = None if self._running.is_full else self._waiting.head()
        if request is None or not self._admission.fits(request):
            return None
        self._waiting.remove(request)
        adapter_id = request.adapter_id
        num_pages = 0 if adapter_id is None else self._adapter_pages(adapter_id)
        load = self._running.start(request, num_pages)
        if load is not None:
            plan.adapter_loads.append(load)
        self._admission.started(request)
        return request

    def _find_prefix(self, request: RequestState) -> None:
        if self._running.find_prefix(request):
            self._admission.estimate_anew()

    def _part(self, request: RequestState, left: int) -> int:
        """How many of the tokens that are left a prompt takes that is not the oldest.

        Where it needs more of them it stops at the end of a page, from where it can go on with what
        others compute meanwhile.
        """
        if self._fraction and request.num_uncomputed > left:
            return whole_pages(request.num_computed, left, self._page_tokens)
        return left

    def _compute(self, plan: StepPlan, request: RequestState, num_tokens: int) -> int:
        """Plan a chunk of at most so many tokens, as pages permit; returns how many."""
        start = request.num_computed
        end = self._running.cover(request, min(start + num_tokens, request.num_tokens))
        if end > start:
            self._running.compute(plan, request, end)
        return end - start
