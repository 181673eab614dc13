"""A scheduler with a pretended device: memory that remembers who wrote each token and page.

Each step is checked as a device would suffer it: a chunk finds the KV of all tokens before it
where its block table says, its adapter's weights on the pages of its slot, and the limits held.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

from slora_core.adapters.residency import AdapterResidency
from slora_core.config import EngineConfig
from slora_core.memory.page_pool import PageOwner, PagePool
from slora_core.scheduling.scheduler import Scheduler
from slora_core.types import FinishReason, Request, RequestOutput, StepPlan

EOS = 2


@dataclass
class Harness:
    """`adapter_sizes` are pages by adapter id; `eos_chance` ends a request at each token."""

    config: EngineConfig
    adapter_sizes: dict[str, int] = field(default_factory=dict)
    max_slots: int = 4
    eos_chance: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.pool = PagePool(self.config.num_pages)
        self.residency = AdapterResidency(self.pool, self.max_slots)
        self.scheduler = Scheduler(
            self.config, self.pool, self.residency, self.adapter_sizes.__getitem__, (EOS,)
        )
        self.live: dict[str, Request] = {}
        self.finished: dict[str, FinishReason] = {}
        # What the queues should hold: running ones in the order in which they started.
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_steps = 0
        self._random = random.Random(self.seed)
        # (page id, offset) of KV, page ids of adapters: who wrote there last.
        self._kv: dict[tuple[int, int], tuple[str, int]] = {}
        self._adapter_pages: dict[int, tuple[str, int]] = {}
        self._slots: dict[int, tuple[str, list[int]]] = {}

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.live[request.request_id] = request
        self.waiting.append(request)

    def abort(self, request_id: str) -> None:
        assert self.scheduler.abort(request_id)
        request = self.live.pop(request_id)
        (self.running if request in self.running else self.waiting).remove(request)
        assert not request.page_ids and request.adapter_slot is None
        self.scheduler.check_integrity()

    def drop_adapter(self, adapter_id: str) -> None:
        self.residency.drop(adapter_id)
        self.scheduler.check_integrity()

    def step(self) -> list[RequestOutput]:
        """Plan, check, pretend to run, commit, check."""
        preemptions = {request_id: r.num_preemptions for request_id, r in self.live.items()}
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        self._follow_running(plan, preemptions)
        self._check_limits(plan)
        self._load_adapters(plan)
        for chunk in plan.chunks:
            self._compute(chunk.request, chunk.start, chunk.end)
        sampled = [chunk.request for chunk in plan.chunks if chunk.samples]
        before = {request.request_id: len(request.output_ids) for request in sampled}
        outputs = self.scheduler.commit(plan, [self._token() for _ in sampled])
        self.scheduler.check_integrity()
        assert [output.request_id for output in outputs] == list(before)
        for output, request in zip(outputs, sampled, strict=True):
            assert request.output_ids[before[output.request_id] :] == output.new_token_ids
            self._check_end(request, output.finish_reason)
        assert plan.chunks or not self.live, "requests wait and nothing runs"
        self.num_steps += 1
        return outputs

    def run_to_end(self) -> None:
        """Finish every request within the number of steps that progress guarantees.

        While one request is the oldest running, each step samples a token of some request or
        computes at least one of the oldest's, which are never freed before it ends.
        """
        limit = sum(r.max_total_tokens + r.params.max_tokens for r in self.live.values())
        start = self.num_steps
        while self.live:
            self.step()
            assert self.num_steps - start <= limit, "requests starve"
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.pool.num_owned(PageOwner.KV) == 0
        assert self.residency.num_pinned_pages == 0

    def _follow_running(self, plan: StepPlan, preemptions: dict[str, int]) -> None:
        oldest = self.running[0] if self.running else None
        preempted = [
            request
            for request in self.running
            if request.num_preemptions > preemptions[request.request_id]
        ]
        assert oldest not in preempted, "the oldest was preempted"
        self.running = [request for request in self.running if request not in preempted]
        self.waiting = preempted + self.waiting
        # What a preempted request wrote may lie on a page that it is given again.
        lost = {request.request_id for request in preempted}
        self._kv = {place: kv for place, kv in self._kv.items() if kv[0] not in lost}
        started = [c.request for c in plan.chunks if c.request not in self.running]
        assert {r.request_id for r in started} == {
            r.request_id for r in self.waiting[: len(started)]
        }, "a request was overtaken"
        self.running += self.waiting[: len(started)]
        del self.waiting[: len(started)]
        for request in self.waiting:
            assert not request.page_ids and request.num_computed == 0

    def _check_limits(self, plan: StepPlan) -> None:
        config = self.config
        assert sum(c.end - c.start for c in plan.chunks) <= config.max_batched_tokens
        assert self.scheduler.num_running <= config.max_running_requests
        assert self.scheduler.num_running == len(self.running)
        assert self.scheduler.num_waiting == len(self.waiting)
        ids = Counter(chunk.request.request_id for chunk in plan.chunks)
        assert not ids or max(ids.values()) == 1
        assert set(ids) == plan.scheduled <= set(self.live)
        decodes = [chunk.is_decode for chunk in plan.chunks]
        assert decodes == sorted(decodes, reverse=True), "decodes come first"
        for is_decode in (True, False):
            slots = [chunk.slot for chunk in plan.chunks if chunk.is_decode is is_decode]
            assert slots == sorted(slots), "an adapter's rows are not one segment"

    def _load_adapters(self, plan: StepPlan) -> None:
        for load in plan.adapter_loads:
            assert len(load.page_ids) == self.adapter_sizes[load.adapter_id]
            for index, page_id in enumerate(load.page_ids):
                self._adapter_pages[page_id] = load.adapter_id, index
                self._forget_kv(page_id)
            self._slots[load.slot] = load.adapter_id, load.page_ids

    def _forget_kv(self, page_id: int) -> None:
        for offset in range(self.config.page_tokens):
            self._kv.pop((page_id, offset), None)

    def _compute(self, request: Request, start: int, end: int) -> None:
        """Read what the chunk depends on, write what it computes."""
        page_tokens = self.config.page_tokens
        assert start == request.num_computed < end <= request.num_tokens
        assert len(request.page_ids) * page_tokens >= end

        def place(token: int) -> tuple[int, int]:
            return request.page_ids[token // page_tokens], token % page_tokens

        for token in range(start):
            assert self._kv.get(place(token)) == (request.request_id, token), "KV was lost"
        for token in range(start, end):
            # Never computed twice: what lies there is not this token's own KV.
            assert self._kv.get(place(token)) != (request.request_id, token)
            self._kv[place(token)] = request.request_id, token
            self._adapter_pages.pop(place(token)[0], None)
        if request.adapter_id is None:
            assert request.adapter_slot is None
            return
        assert request.adapter_slot is not None
        adapter_id, page_ids = self._slots[request.adapter_slot]
        assert adapter_id == request.adapter_id
        for index, page_id in enumerate(page_ids):
            assert self._adapter_pages.get(page_id) == (adapter_id, index), "weights were lost"

    def _token(self) -> int:
        return EOS if self._random.random() < self.eos_chance else self._random.randint(3, 9)

    def _check_end(self, request: Request, reason: FinishReason | None) -> None:
        params = request.params
        last = request.output_ids[-1]
        stops = last in params.stop_token_ids or (last == EOS and not params.ignore_eos)
        ended = stops or len(request.output_ids) == params.max_tokens
        assert (reason is not None) == ended
        if reason is not None:
            assert reason is (FinishReason.STOP if stops else FinishReason.LENGTH)
            assert not request.page_ids and request.adapter_slot is None
            self.finished[request.request_id] = reason
            self.running.remove(self.live.pop(request.request_id))
