"""What one replica holds: told with its deltas, to Serve's routers and to Serve's autoscaler.

Owns the count of its requests and which adapters were asked for of late. `server` tells it of
requests and of the engine's pages. It knows no Ray.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.registry.state import AdapterRecord
from app.replica.adapter_heat import AdapterHeat
from app.routing.autoscaling import QUEUED_TOKENS, RUNNING_TOKENS, USED_PAGE_SHARE
from slora_core.requests import Delta, LoadFigures, Request
from slora_core.stats import EngineStats


class LoadMeter:
    """Counts what is between the call of `EngineServer.generate` and its end."""

    def __init__(
        self, replica_id: str, page_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.heat = AdapterHeat(clock)
        self._replica_id = replica_id
        self._page_tokens = page_tokens
        self._num_requests = self._num_waiting = self._queued_tokens = 0
        # As the engine last said.
        self._num_pages, self._num_free, self._num_kv = 1, 1, 0

    @contextmanager
    def counted(
        self, request: Request, record: AdapterRecord | None
    ) -> Iterator[Callable[[Delta], Delta]]:
        """Count a request; its deltas go through what is yielded, which adds the load to some."""
        if record is not None:
            self.heat.add(record)
        num_tokens = len(request.prompt_ids) + len(request.output_ids)
        is_waiting = True
        self._num_requests += 1
        self._wait(1, num_tokens)

        def told(delta: Delta) -> Delta:
            nonlocal is_waiting
            is_first = is_waiting
            if is_waiting:
                is_waiting = False
                self._wait(-1, num_tokens)
            return delta._replace(load=self.figures()) if is_first or delta.is_last else delta

        try:
            yield told
        finally:
            self._num_requests -= 1
            if is_waiting:
                self._wait(-1, num_tokens)

    @property
    def needs_pages(self) -> bool:
        """Whether `saw_pages` would have news."""
        return self._num_requests > 0 or self._num_kv > 0

    def saw_pages(self, stats: EngineStats) -> None:
        self._num_pages = stats.num_pages
        self._num_free = stats.num_free_pages + stats.num_idle_prefix_pages
        self._num_kv = stats.num_kv_pages

    def figures(self) -> LoadFigures:
        return LoadFigures(
            self._replica_id,
            self._num_requests,
            self._num_waiting,
            self._queued_tokens,
            self._num_free / self._num_pages,
        )

    @property
    def coarse_num_requests(self) -> int:
        """Its two highest bits, at most a third less: each change goes to every router."""
        shift = max(0, self._num_requests.bit_length() - 2)
        return self._num_requests >> shift << shift

    def autoscaling_stats(self) -> dict[str, float]:
        return {
            QUEUED_TOKENS: float(self._queued_tokens),
            RUNNING_TOKENS: float(self._num_kv * self._page_tokens),
            USED_PAGE_SHARE: self._num_kv / self._num_pages,
        }

    def _wait(self, by: int, num_tokens: int) -> None:
        self._num_waiting += by
        self._queued_tokens += by * num_tokens
