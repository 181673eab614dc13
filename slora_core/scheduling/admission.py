"""Peak-page admission: how many KV pages the running requests will need at their worst moment.

Arithmetic over lengths; changes nothing. Source: the peak-memory estimate of LightLLM's router,
which S-LoRA (Sheng et al., 2023) builds on, counted in pages here.
"""

from bisect import insort
from collections.abc import Callable, Iterable

from slora_core.adapters.residency import AdapterResidency
from slora_core.config import EngineConfig
from slora_core.memory.page_pool import PagePool
from slora_core.memory.prefix_cache import PrefixCache
from slora_core.requests import RequestState
from slora_core.scheduling.running_set import RunningSet

# Steps after which a head of the queue that did not fit is tried again, though nothing was given
# back: running requests that come near their ends lower the peak, too, if slowly.
_RETRY_STEPS = 8


def expected_total_tokens(request: RequestState, config: EngineConfig, num_planned: int = 0) -> int:
    """Prompt + output tokens the request is assumed to reach.

    Its max_tokens where nothing can stop it before. Else at least its min_tokens and one more than
    it has, pending ones and `num_planned` more included, unless those are its max_tokens.
    """
    limit, sampling = request.max_total_tokens, request.sampling
    runs_on = sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids
    if config.admission_output_tokens is None or runs_on:
        return limit
    num_output = max(config.admission_output_tokens, sampling.min_tokens)
    expected = len(request.prompt_ids) + num_output
    return min(limit, max(expected, request.num_tokens + num_planned + 1))


class PeakEstimate:
    """Upper bound of the KV pages held at once if every request runs to its expected end.

    A request's pages are freed when it ends, so the peak is reached just before some request
    ends: with requests by remaining tokens descending, when the i-th ends the first i + 1 still
    run, each having grown by the i-th's remaining tokens and wasting less than a page.
    """

    def __init__(self, requests: Iterable[RequestState], config: EngineConfig) -> None:
        self._config = config
        # (remaining tokens negated, tokens on pages of its own), ascending.
        self._lengths = sorted(self._length(r, r.num_matched_pages) for r in requests)

    def add(self, request: RequestState, num_planned: int = 0) -> None:
        """One more request, which has `num_planned` tokens more once this step is planned."""
        insort(self._lengths, self._length(request, request.num_matched_pages, num_planned))

    def pages(self, candidate: RequestState | None = None, num_matched_pages: int = 0) -> int:
        """The peak, with a candidate beside the requests where one is given.

        Pages that requests found in the prefix cache, the candidate `num_matched_pages`, are not
        counted: they are nobody's own.
        """
        lengths = self._lengths
        if candidate is not None:
            lengths = lengths.copy()
            insort(lengths, self._length(candidate, num_matched_pages))
        page_tokens = self._config.page_tokens
        peak = held_tokens = 0
        for count, (negated, num_tokens) in enumerate(lengths, start=1):
            held_tokens += num_tokens
            rounded_up = held_tokens + count * (page_tokens - 1 - negated)
            if rounded_up > peak:
                peak = rounded_up
        return peak // page_tokens

    def _length(
        self, request: RequestState, num_matched_pages: int, num_planned: int = 0
    ) -> tuple[int, int]:
        num_tokens = request.num_tokens + num_planned
        num_own = num_tokens - num_matched_pages * self._config.page_tokens
        expected = expected_total_tokens(request, self._config, num_planned)
        return num_tokens - expected, num_own


class Admission:
    """Whether the head of the waiting queue will, by estimate, run to its end beside the others."""

    def __init__(
        self,
        config: EngineConfig,
        pool: PagePool,
        residency: AdapterResidency,
        prefixes: PrefixCache,
        running: RunningSet,
        adapter_pages: Callable[[str], int],
    ) -> None:
        self._config = config
        self._pool = pool
        self._residency = residency
        self._prefixes = prefixes
        self._running = running
        self._adapter_pages = adapter_pages
        # Of the running requests in one step; made when it is first asked for.
        self._estimate: PeakEstimate | None = None
        # The request that did not fit, with `num_released` then, and how long it has to wait.
        self._postponed: tuple[RequestState, int] | None = None
        self._postponed_steps = 0

    def begin_step(self) -> None:
        """Forget what was estimated: running requests have grown."""
        self._estimate = None
        self._postponed_steps -= 1

    def estimate_anew(self) -> None:
        """Forget what was estimated: a running request found pages that others have computed."""
        self._estimate = None

    def fits(self, request: RequestState) -> bool:
        """Whether the request may start beside what runs, with what `started` in this step."""
        attempt = request, self._running.num_released
        if attempt == self._postponed and self._postponed_steps > 0:
            return False
        if self._estimate is None:
            self._estimate = PeakEstimate(self._running, self._config)
        if self._has_room(request, self._estimate):
            return True
        # What a prompt computes may be found by others, each step anew.
        if not any(running.num_uncomputed > 1 for running in self._running):
            self._postponed, self._postponed_steps = attempt, _RETRY_STEPS
        return False

    def started(self, request: RequestState) -> None:
        """The request runs from this step on, in which it may sample its first token."""
        assert self._estimate is not None
        self._estimate.add(request, 1)

    def _has_room(self, request: RequestState, estimate: PeakEstimate) -> bool:
        new_pinned = 0
        if request.adapter_id is not None:
            if not self._residency.can_acquire(request.adapter_id):
                return False
            if not self._residency.is_pinned(request.adapter_id):
                new_pinned = self._adapter_pages(request.adapter_id)
        if self._running.holds_nothing:
            # Alone it fits to the end: the scheduler made sure when it was queued.
            return True
        # The peak counts what each holds now, so what fits by it can also start now. Shared pages
        # count once more, beside those of the request that computed them if that still runs. What
        # drains grows no more; that it goes before the peak is worth no thought for a step or two.
        tokens = request.token_ids(0, request.num_tokens)
        matched = self._prefixes.match(request.adapter_id, tokens)
        kv_pages = estimate.pages(request, len(matched)) + self._running.num_draining_pages
        kv_pages += self._prefixes.num_shared_pages + self._prefixes.num_newly_shared(matched)
        adapter_pages = self._residency.num_pinned_pages + new_pinned
        return kv_pages + adapter_pages <= self._pool.num_pages
