"""A scheduler with a pretended device: memory that remembers who wrote each token and page.

The device lags as far as it may: a step computes just before it is committed, by the block tables
and slots of its launch, while adapters are copied as soon as they are planned. Each step is checked
as a device would suffer it: a chunk finds the KV of all tokens before it where its block table
says, its adapter's weights on the pages of its slot, and the limits held.
"""

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from slora_core.adapters.residency import AdapterResidency
from slora_core.config import EngineConfig
from slora_core.errors import SLoRAError
from slora_core.memory.eviction import EvictionQueue
from slora_core.memory.page_pool import PageOwner, PagePool
from slora_core.memory.prefix_cache import PrefixCache
from slora_core.requests import (
    Delta,
    FinishReason,
    Request,
    RequestState,
    SamplingParams,
    ScheduledChunk,
    StepOutput,
    StepPlan,
)
from slora_core.scheduling.scheduler import Scheduler
from slora_core.scheduling.waiting_queue import FirstComeQueue, WaitingQueue

EOS = 2


def make_config(
    num_pages: int,
    *,
    page_tokens: int = 4,
    budget: int = 64,
    max_running: int = 8,
    assumed: int | None = None,
    inflight: int = 1,
    prefix_caching: bool = False,
    shared: float = 0.5,
) -> EngineConfig:
    return EngineConfig(
        page_tokens=page_tokens,
        num_pool_tokens=num_pages * page_tokens,
        max_batched_tokens=budget,
        max_running_requests=max_running,
        admission_output_tokens=assumed,
        max_inflight_steps=inflight,
        prefix_caching=prefix_caching,
        shared_prefill_fraction=shared,
    )


def make_request(
    request_id: str,
    num_prompt: int,
    max_tokens: int = 4,
    adapter_id: str | None = None,
    *,
    first_token: int = 7,
    num_output: int = 0,
    **params,
) -> RequestState:
    """Prompts of one `first_token` share their prefix; `num_output` tokens are answered already."""
    sampling = SamplingParams(max_tokens=max_tokens, **params)
    prompt = [first_token] + [7] * (num_prompt - 1)
    output = [7] * num_output
    return RequestState(Request(prompt, sampling, adapter_id, output, request_id=request_id))


@dataclass(frozen=True)
class LaunchedChunk:
    """What the device was given with a chunk."""

    chunk: ScheduledChunk
    page_ids: list[int]
    table_idx: int
    # Id and pages of the adapter in the chunk's slot; None for the base model.
    adapter: tuple[str, list[int]] | None


@dataclass
class Harness:
    """Args:
    adapter_sizes: pages by adapter id.
    eos_chance: ends a request at each token.
    policy: the scheduler's waiting queue; what it does is to start requests by `order`, the
        smallest first, or, without one, first come, first served.
    """

    config: EngineConfig
    adapter_sizes: dict[str, int] = field(default_factory=dict)
    max_slots: int = 4
    eos_chance: float = 0.0
    seed: int = 0
    policy: WaitingQueue = field(default_factory=FirstComeQueue)
    order: Callable[[RequestState], Any] | None = None

    def __post_init__(self) -> None:
        self.pool = PagePool(self.config.num_pages)
        queue = EvictionQueue(self.pool)
        self.residency = AdapterResidency(self.pool, queue, self.max_slots)
        self.prefixes = PrefixCache(
            self.pool, queue, self.config.page_tokens, enabled=self.config.prefix_caching
        )
        self.scheduler = Scheduler(
            self.config,
            self.pool,
            queue,
            self.residency,
            self.prefixes,
            self.adapter_sizes.__getitem__,
            (EOS,),
            self.policy,
        )
        self.live: dict[str, RequestState] = {}
        self.finished: dict[str, FinishReason] = {}
        # Refused ones that no step has told.
        self.untold: dict[str, SLoRAError] = {}
        # What the queues should hold: running ones in the order in which they started.
        self.waiting: list[RequestState] = []
        self.running: list[RequestState] = []
        self.num_steps = 0
        # Launched and not committed, the oldest first.
        self.inflight: deque[tuple[StepPlan, list[LaunchedChunk]]] = deque()
        self.num_discarded = self.num_blocked = 0
        self._random = random.Random(self.seed)
        # Tokens of the answer that came with the request or that launched steps sample.
        self._num_output: Counter[RequestState] = Counter()
        # Ended requests with their outputs, which must not change any more.
        self._ended: list[tuple[RequestState, list[int]]] = []
        # Of each request, a hash of adapter and tokens up to each token that was an input.
        self._texts: dict[RequestState, list[int]] = {}
        # (page id, offset) of KV: what lies there, and who wrote it in which run of a request.
        self._kv: dict[tuple[int, int], tuple[int, tuple[RequestState, int, int]]] = {}
        # Page ids of adapters: who was written there last.
        self._adapter_pages: dict[int, tuple[str, int]] = {}
        self._slots: dict[int, tuple[str, list[int]]] = {}

    def add(self, request: RequestState) -> None:
        self.scheduler.add(request)
        self.live[request.request_id] = request
        self._num_output[request] = len(request.output_ids)
        self._queue([*self.waiting, request])

    def abort(self, request_id: str) -> None:
        assert self.scheduler.abort(request_id)
        self._left(request_id)

    def refuse(self, request_id: str, error: SLoRAError) -> None:
        assert self.scheduler.refuse(request_id, error)
        self.untold[request_id] = error
        self._left(request_id)

    def drop_adapter(self, adapter_id: str) -> None:
        self.residency.drop(adapter_id)
        self.prefixes.drop(adapter_id)
        self._check()

    def step(self) -> list[Delta]:
        """Launch and commit as the engine does, and tell what was refused."""
        deltas = []
        plan = self.launch()
        if plan.blocked:
            assert self.inflight, "blocked with nothing in flight"
            deltas += self.flush()
            plan = self.launch()
            assert not plan.blocked
        refused, self.untold = self.untold, {}
        assert self.scheduler.take_refused() == refused
        deltas += StepOutput(endings={**refused}).deltas()
        assert self.inflight or not self.live, "requests wait and nothing runs"
        if self.inflight and (
            not plan.chunks or len(self.inflight) >= self.config.max_inflight_steps
        ):
            deltas += self.commit()
        return deltas

    def launch(self) -> StepPlan:
        """Plan and check a step, and hand it to the device if anything runs."""
        preemptions = {request_id: r.num_preemptions for request_id, r in self.live.items()}
        plan = self.scheduler.schedule()
        self.num_blocked += plan.blocked
        self._follow_running(plan, preemptions)
        self._check_limits(plan)
        self._check_budget(plan)
        self._load_adapters(plan)
        if plan.chunks:
            self.inflight.append((plan, [self._launch_chunk(chunk) for chunk in plan.chunks]))
        self._check()
        return plan

    def commit(self) -> list[Delta]:
        """Pretend to run the oldest step in flight, commit, check."""
        plan, chunks = self.inflight.popleft()
        # As on a device, all rows are written before any is read.
        for launched in chunks:
            self._write(launched)
        for launched in chunks:
            self._read(launched)
        sampled = [(chunk.request, self._token()) for chunk in plan.chunks if chunk.samples]
        for request, token in sampled:
            self._extend_text(request, [token])
        expected = [
            (request, token, len(request.output_ids))
            for request, token in sampled
            if self.live.get(request.request_id) is request
        ]
        self.num_discarded += len(sampled) - len(expected)
        deltas = self.scheduler.commit(plan, [token for _, token in sampled]).deltas()
        for delta, (request, token, index) in zip(deltas, expected, strict=True):
            assert (delta.request_id, delta.token_ids) == (request.request_id, [token])
            assert request.output_ids[index:] == [token]
            assert delta.error is None
            self._check_end(request, delta.finish_reason)
        self._check()
        self.num_steps += 1
        return deltas

    def flush(self) -> list[Delta]:
        """Commit all steps in flight."""
        deltas = []
        while self.inflight:
            deltas += self.commit()
        return deltas

    def run_to_end(self) -> None:
        """Finish every request within the number of steps that progress guarantees.

        While one request is the oldest running, each step samples a token of some request or
        computes at least one of the oldest's, which are never freed before it ends. A step in
        flight when a request ends may have computed nothing else.
        """
        limit = sum(r.max_total_tokens + r.sampling.max_tokens + 1 for r in self.live.values())
        limit += len(self.inflight)
        start = self.num_steps
        while self.live or self.inflight or self.untold:
            self.step()
            assert self.num_steps - start <= limit, "requests starve"
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.pool.num_owned(PageOwner.KV) == self.prefixes.num_idle_pages
        assert self.prefixes.num_shared_pages == 0
        assert self.residency.num_pinned_pages == 0
        for request, output_ids in self._ended:
            assert request.output_ids == output_ids
            assert not request.page_ids and request.adapter_slot is None
            assert request.table_idx == -1
            assert request.num_pending == request.num_inflight == 0

    def _left(self, request_id: str) -> None:
        """A request was taken out before its end."""
        request = self.live.pop(request_id)
        (self.running if request in self.running else self.waiting).remove(request)
        self._ended.append((request, list(request.output_ids)))
        self._check()

    def _queue(self, requests: list[RequestState]) -> None:
        """What waits now: in this order, or in that of the policy."""
        self.waiting = requests if self.order is None else sorted(requests, key=self.order)

    def _check(self) -> None:
        """The books balance, and no step in flight lost anything that it uses."""
        self.scheduler.check_integrity()
        assert self.scheduler.has_work == bool(self.live or self.untold)
        resident = self.residency.resident_ids()
        for _, chunks in self.inflight:
            for launched in chunks:
                request = launched.chunk.request
                assert request.page_ids[: len(launched.page_ids)] == launched.page_ids
                assert request.table_idx == launched.table_idx
                if launched.adapter is not None:
                    assert self._slots[launched.chunk.slot] == launched.adapter
                    assert launched.adapter[0] in resident

    def _follow_running(self, plan: StepPlan, preemptions: dict[str, int]) -> None:
        oldest = self.running[0] if self.running else None
        preempted = [
            request
            for request in self.running
            if request.num_preemptions > preemptions[request.request_id]
        ]
        assert oldest not in preempted, "the oldest was preempted"
        assert not (preempted and self.inflight), "preempted with steps in flight"
        self.running = [request for request in self.running if request not in preempted]
        self._queue(preempted + self.waiting)
        # Some of them wait for their first chunk.
        started = [request for request in self.waiting if request.table_idx >= 0]
        assert started == self.waiting[: len(started)], "a request was overtaken"
        self.running += started
        del self.waiting[: len(started)]
        assert all(chunk.request in self.running for chunk in plan.chunks)
        for request in self.waiting:
            assert not request.page_ids and request.num_computed == 0

    def _check_limits(self, plan: StepPlan) -> None:
        config = self.config
        assert sum(c.end - c.start for c in plan.chunks) <= config.max_batched_tokens
        table_idxs = [chunk.request.table_idx for chunk in plan.chunks]
        assert len(set(table_idxs)) == len(table_idxs) <= config.max_running_requests
        assert all(0 <= index < config.max_running_requests for index in table_idxs)
        assert self.scheduler.num_running == len(self.running)
        assert self.scheduler.num_waiting == len(self.waiting)
        ids = Counter(chunk.request.request_id for chunk in plan.chunks)
        assert not ids or max(ids.values()) == 1
        assert all(self.live[chunk.request.request_id] is chunk.request for chunk in plan.chunks)
        decodes = [chunk.is_decode for chunk in plan.chunks]
        assert decodes == sorted(decodes, reverse=True), "decodes come first"
        for is_decode in (True, False):
            slots = [chunk.slot for chunk in plan.chunks if chunk.is_decode is is_decode]
            assert slots == sorted(slots), "an adapter's rows are not one segment"

    def _check_budget(self, plan: StepPlan) -> None:
        """A page of tokens is left only where pages lack; only so many prompts are cut."""
        cut = [chunk for chunk in plan.chunks if not (chunk.samples or chunk.is_decode)]
        assert len(cut) <= 3, "the oldest, the longest beside it, and one more of what that leaves"
        within = [request for request in self.running if request.num_uncomputed > 1]
        num_tokens = sum(chunk.end - chunk.start for chunk in plan.chunks)
        # Prompts that share a step stop at the end of a page.
        slack = self.config.page_tokens if self.config.shared_prefill_fraction else 1
        if within and not plan.blocked and num_tokens <= self.config.max_batched_tokens - slack:
            idle_adapters = self.pool.num_owned(PageOwner.ADAPTER) - self.residency.num_pinned_pages
            assert not self.pool.num_free + self.prefixes.num_idle_pages + idle_adapters

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

    def _launch_chunk(self, chunk: ScheduledChunk) -> LaunchedChunk:
        """Check what was fixed with the plan, and keep what the device is given."""
        request = chunk.request
        num_output = self._num_output[request]
        num_tokens = len(request.prompt_ids) + num_output
        num_known = len(request.prompt_ids) + len(request.output_ids)
        assert chunk.start < chunk.end <= num_tokens
        assert chunk.samples == (chunk.end == num_tokens)
        assert chunk.input_pending == (chunk.end > num_known)
        assert not chunk.input_pending or chunk.end - chunk.start == 1
        if chunk.samples:
            assert chunk.token_index == num_output < request.sampling.max_tokens
            self._num_output[request] += 1
        assert len(request.page_ids) * self.config.page_tokens >= chunk.end
        adapter = None
        if request.adapter_id is None:
            assert request.adapter_slot is None and chunk.slot == -1
        else:
            assert request.adapter_slot == chunk.slot
            adapter = self._slots[chunk.slot]
            assert adapter[0] == request.adapter_id
        return LaunchedChunk(chunk, list(request.page_ids), request.table_idx, adapter)

    def _extend_text(self, request: RequestState, tokens: list[int]) -> list[int]:
        """Hashes of the request's text, which grows by what is sampled, discarded or not."""
        if request not in self._texts:
            self._texts[request] = []
            self._extend_text(request, [*request.prompt_ids, *request.request.output_ids])
        text = self._texts[request]
        for token in tokens:
            text.append(hash((text[-1] if text else request.adapter_id, token)))
        return text

    def _place(self, launched: LaunchedChunk, token: int) -> tuple[int, int]:
        page, offset = divmod(token, self.config.page_tokens)
        return launched.page_ids[page], offset

    def _write(self, launched: LaunchedChunk) -> None:
        request, start, end = launched.chunk[:3]
        text = self._extend_text(request, [])
        for token in range(start, end):
            place = self._place(launched, token)
            writer = request, token, request.num_preemptions
            assert place not in self._kv or self._kv[place][1] != writer, "computed twice"
            self._kv[place] = text[token], writer
            self._adapter_pages.pop(place[0], None)

    def _read(self, launched: LaunchedChunk) -> None:
        request, _, end = launched.chunk[:3]
        text = self._extend_text(request, [])
        for token in range(end):
            content, _ = self._kv.get(self._place(launched, token), (None, None))
            assert content == text[token], "KV was lost"
        if launched.adapter is not None:
            adapter_id, page_ids = launched.adapter
            for index, page_id in enumerate(page_ids):
                assert self._adapter_pages.get(page_id) == (adapter_id, index), "weights were lost"

    def _token(self) -> int:
        return EOS if self._random.random() < self.eos_chance else self._random.randint(3, 9)

    def _check_end(self, request: RequestState, reason: FinishReason | None) -> None:
        sampling = request.sampling
        last = request.output_ids[-1]
        stops = last in sampling.stop_token_ids or (last == EOS and not sampling.ignore_eos)
        ended = stops or len(request.output_ids) == sampling.max_tokens
        assert (reason is not None) == ended
        if reason is not None:
            assert reason is (FinishReason.STOP if stops else FinishReason.LENGTH)
            assert request.request_id not in self.finished
            assert request.num_inflight or not request.page_ids
            self.finished[request.request_id] = reason
            self._ended.append((request, list(request.output_ids)))
            self.running.remove(self.live.pop(request.request_id))
