"""Feeds an engine for benchmarks: its adapters, requests all at once or as they arrive, clocks.

Knows no workload; `figures` makes figures of what it returns.
"""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from benchmarks.engine.dummy_adapters import DummyAdapters
from slora_core.engine.engine import Engine
from slora_core.requests import Request, RequestState, StepOutput


@dataclass
class Timing:
    """Seconds after the start of a run, and steps that the engine had committed by then."""

    arrival_s: float
    arrival_step: int
    token_s: list[float] = field(default_factory=list)
    first_token_step: int = 0

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.arrival_s


class EngineDriver:
    """Args:
    families: adapters by the name that their ids begin with.
    """

    def __init__(self, engine: Engine, families: Mapping[str, DummyAdapters]) -> None:
        self.engine = engine
        self._families = families
        self._num_requests = 0

    @property
    def vocab_size(self) -> int:
        return self.engine.model.vocab_size

    def add(self, entries: Sequence[Request]) -> list[RequestState]:
        """Queue requests under names of their own, and make their adapters known."""
        live = []
        for entry in entries:
            if entry.adapter_id is not None and not self.engine.has_adapter(entry.adapter_id):
                family, _, index = entry.adapter_id.rpartition("-")
                self.engine.add_adapter(self._families[family][int(index)])
            self._num_requests += 1
            request = replace(entry, request_id=f"bench-{self._num_requests}")
            live.append(self.engine.add_request(request))
        return live

    def run(self, entries: Sequence[Request]) -> float:
        """Seconds from the requests' arrival, all at once, to the last one's end."""
        gc.collect()
        self.settle()
        started = time.perf_counter()
        live = self.add(entries)
        self.finish()
        seconds = time.perf_counter() - started
        self._check(entries, live)
        return seconds

    def run_open_loop(
        self, entries: Sequence[Request], arrivals_s: Sequence[float]
    ) -> list[Timing]:
        """Run requests that arrive at these seconds after the start, whatever is still open."""
        gc.collect()
        self.settle()
        live: list[RequestState] = []
        timings: dict[str, Timing] = {}
        started = time.perf_counter()
        while len(live) < len(entries) or self.engine.has_work:
            now = time.perf_counter() - started
            while len(live) < len(entries) and arrivals_s[len(live)] <= now:
                index = len(live)
                live += self.add([entries[index]])
                timings[live[-1].request_id] = Timing(arrivals_s[index], self._num_steps)
            if self.engine.has_work:
                self._note(timings, self.engine.step(), started)
            else:
                time.sleep(max(0.0, arrivals_s[len(live)] - (time.perf_counter() - started)))
        self._check(entries, live)
        return list(timings.values())

    def finish(self) -> None:
        while self.engine.has_work:
            self.engine.step()

    def prefill(self, live: Sequence[RequestState]) -> None:
        """Step until every request's prompt is in steps that were launched."""
        while any(request.num_computed < len(request.prompt_ids) for request in live):
            self.engine.step()

    def forget_adapters(self) -> None:
        """Empty the pool of adapters that no request uses."""
        for adapter_id in self.engine.stats().resident_adapters:
            self.engine.drop_adapter(adapter_id)

    def settle(self) -> None:
        """Wait for the device."""
        if self.engine.config.device == "cuda":
            torch.cuda.synchronize()

    @property
    def _num_steps(self) -> int:
        return self.engine.stats().num_steps

    def _note(self, timings: Mapping[str, Timing], output: StepOutput, started: float) -> None:
        now = time.perf_counter() - started
        for request_id in output.request_ids:
            timing = timings[request_id]
            if not timing.token_s:
                timing.first_token_step = self._num_steps
            timing.token_s.append(now)

    def _check(self, entries: Sequence[Request], live: Sequence[RequestState]) -> None:
        """Every request was answered to its end, and no page is lost."""
        for entry, request in zip(entries, live, strict=True):
            assert len(request.output_ids) == entry.sampling.max_tokens, request.request_id
        self.engine.check_integrity()
