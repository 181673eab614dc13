"""The requests that hold pages, a place in the device's tables and an adapter.

Owns how they get them and when they give them back. The scheduler and its prefill planner decide
who starts, grows and leaves.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from slora_core.adapters.residency import AdapterResidency
from slora_core.config import EngineConfig
from slora_core.memory.eviction import EvictionQueue
from slora_core.memory.page_pool import PageOwner, PagePool, pages_for
from slora_core.memory.prefix_cache import PrefixCache
from slora_core.requests import AdapterLoad, RequestState, StepPlan


class RunningSet:
    """Running requests in the order of their admission, and ended ones that drain.

    A request that ends while steps in flight have chunks of it leaves the running ones at once and
    drains: nothing that such a step reads or writes may become another's before it is committed.
    """

    def __init__(
        self,
        config: EngineConfig,
        pool: PagePool,
        queue: EvictionQueue,
        residency: AdapterResidency,
        prefixes: PrefixCache,
    ) -> None:
        self._config = config
        self._page_tokens = config.page_tokens
        self._pool = pool
        self._queue = queue
        self._residency = residency
        self._prefixes = prefixes
        self._running: dict[str, RequestState] = {}
        # Not by id, which may be in use again.
        self._draining: set[RequestState] = set()
        self._free_table_idxs = list(range(config.max_running_requests - 1, -1, -1))
        # How often a request gave back what it held.
        self.num_released = 0
        # Tokens of prompts found in the prefix cache; not of ones computed anew.
        self.num_cached_prompt_tokens = 0

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[RequestState]:
        """Running requests, the oldest first; what leaves meanwhile is still visited."""
        return iter(list(self._running.values()))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._running

    @property
    def youngest(self) -> RequestState:
        return next(reversed(self._running.values()))

    @property
    def is_full(self) -> bool:
        """Whether every place in the tables is taken, by running requests or by ones that drain."""
        return not self._free_table_idxs

    @property
    def holds_nothing(self) -> bool:
        return not self._running and not self._draining

    @property
    def num_draining_pages(self) -> int:
        return sum(len(request.page_ids) for request in self._draining)

    def start(self, request: RequestState, num_adapter_pages: int) -> AdapterLoad | None:
        """Add the youngest, with the pages that the prefix cache has of it.

        Returns the copy that is due where its adapter was not resident.
        """
        # Held before the adapter asks for room, which may evict what is idle.
        self.find_prefix(request)
        load = None
        if request.adapter_id is not None:
            request.adapter_slot, load = self._residency.acquire(
                request.adapter_id, num_adapter_pages
            )
        request.table_idx = self._free_table_idxs.pop()
        self._running[request.request_id] = request
        return load

    def find_prefix(self, request: RequestState) -> bool:
        """Take the pages that the prefix cache has of a prompt from where it is computed on.

        Nothing is found where that is not the end of a page that others can find too: then it goes
        on with pages of its own. What it computed before counts as found from now on.
        """
        held = request.num_prefix_pages
        if len(request.page_ids) != held or request.num_computed != held * self._page_tokens:
            return False
        tokens = request.token_ids(request.num_computed, request.num_tokens)
        last_page = request.page_ids[-1] if held else None
        found = self._prefixes.match(request.adapter_id, tokens, last_page)
        if not found:
            return False
        self._prefixes.share(request.page_ids[request.num_matched_pages :])
        request.page_ids += self._prefixes.acquire(found)
        request.num_prefix_pages = request.num_matched_pages = len(request.page_ids)
        start, num_found = request.num_computed, len(found) * self._page_tokens
        request.num_computed += num_found
        if not request.num_preemptions:
            self.num_cached_prompt_tokens += num_found
            # Less what is of an answer that began elsewhere.
            left = max(0, len(request.prompt_ids) - start)
            request.num_cached_tokens += min(num_found, left)
        return True

    def awaits(self, request: RequestState, other: RequestState) -> bool:
        """Whether `other` is about to compute the page that `request` will then find."""
        if not self._config.prefix_caching or request.adapter_id != other.adapter_id:
            return False
        held = len(request.page_ids)
        start, end = held * self._page_tokens, (held + 1) * self._page_tokens
        # As the cache matches, a prompt computes its last two tokens itself.
        if request.num_computed != start or end > request.num_tokens - 2:
            return False
        return (
            other.num_computed < end <= other.num_tokens
            and other.page_ids[:held] == request.page_ids
            and other.token_ids(start, end) == request.token_ids(start, end)
        )

    def cover(self, request: RequestState, num_tokens: int) -> int:
        """Give a request pages for `num_tokens` tokens, or as many as are free or idle.

        Returns for how many of them it has pages.
        """
        missing = pages_for(num_tokens, self._page_tokens) - len(request.page_ids)
        if missing > 0:
            self._queue.make_room(missing)
            num_pages = min(missing, self._pool.num_free)
            request.page_ids += self._pool.allocate(num_pages, PageOwner.KV)
        return min(num_tokens, len(request.page_ids) * self._page_tokens)

    def compute(self, plan: StepPlan, request: RequestState, end: int) -> None:
        """Plan the request's tokens up to `end`, and take them for computed from here on."""
        chunk = plan.add(request, end)
        request.num_computed = end
        request.num_inflight += 1
        request.num_pending += chunk.samples
        if not chunk.is_decode:
            self._computed(request)

    def end(self, request: RequestState) -> None:
        """Take a request out that will not go on."""
        del self._running[request.request_id]
        request.ended = True
        if request.num_inflight:
            self._draining.add(request)
        else:
            self._release(request)

    def settle(self, request: RequestState) -> None:
        """A step with a chunk of an ended request was committed."""
        if not request.num_inflight:
            self._draining.remove(request)
            self._release(request)

    def preempt(self, request: RequestState) -> None:
        """Take a request out that will be computed anew; no step in flight may have it."""
        assert not request.num_inflight
        del self._running[request.request_id]
        self._release(request)
        request.num_computed = 0
        request.num_preemptions += 1

    def forget(self, adapter_ids: Iterable[str | None]) -> None:
        """Drop what is kept of adapters, which nobody uses: their pages, and prefixes of theirs."""
        for adapter_id in adapter_ids:
            self._prefixes.drop(adapter_id)
            if adapter_id is not None:
                self._residency.drop(adapter_id)

    def check_integrity(self, num_inflight: int) -> None:
        """Assert one owner a page and table index, and that block tables cover what is computed."""
        holding = [*self._running.values(), *self._draining]
        holders = Counter(page_id for request in holding for page_id in request.page_ids)
        self._prefixes.check_integrity(holders)
        kv_pages = [*holders, *self._prefixes.idle_page_ids()]
        self._pool.check_integrity(kv_pages, self._residency.page_ids())
        table_idxs = sorted([*self._free_table_idxs, *(request.table_idx for request in holding)])
        assert table_idxs == list(range(self._config.max_running_requests))
        for request in holding:
            computed = pages_for(request.num_computed, self._page_tokens)
            assert len(request.page_ids) >= computed >= request.num_prefix_pages
            assert request.num_prefix_pages >= request.num_matched_pages
            assert request.num_pending <= request.num_inflight <= num_inflight
        assert all(request.ended and request.num_inflight for request in self._draining)

    def _computed(self, request: RequestState) -> None:
        """Let later requests, of this step too, find what the step just planned computes.

        A step writes the KV of all its rows before any row reads it.
        """
        known = len(request.prompt_ids) + len(request.output_ids)
        num_tokens = min(request.num_computed, known)
        if num_tokens // self._page_tokens > request.num_prefix_pages:
            request.num_prefix_pages = self._prefixes.extend(
                request.adapter_id,
                request.token_ids(0, num_tokens),
                request.page_ids,
                request.num_prefix_pages,
            )

    def _release(self, request: RequestState) -> None:
        self._computed(request)
        self._prefixes.release(
            request.page_ids, request.num_prefix_pages, request.num_matched_pages
        )
        request.page_ids = []
        request.num_prefix_pages = request.num_matched_pages = 0
        self._free_table_idxs.append(request.table_idx)
        request.table_idx = -1
        if request.adapter_id is not None:
            self._residency.release(request.adapter_id)
            request.adapter_slot = None
            if not self._residency.is_resident(request.adapter_id):
                # It was dropped while it was used.
                self._prefixes.drop(request.adapter_id)
        self.num_released += 1
