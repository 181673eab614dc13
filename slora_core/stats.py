"""Counters and gauges of one engine, as its replica and the operators see them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """A snapshot between two steps; counters count from the engine's start."""

    num_waiting: int
    num_running: int
    # Pages of the unified pool; free ones, KV of requests, KV kept as prefixes that no request uses
    # and adapters add up to num_pages.
    num_pages: int
    num_free_pages: int
    num_kv_pages: int
    num_idle_prefix_pages: int
    num_adapter_pages: int
    # Adapters with pages in the pool, used or idle, by content hash.
    resident_adapters: tuple[str, ...]
    num_adapter_loads: int
    num_adapter_hits: int
    num_adapter_evictions: int
    num_preemptions: int
    num_finished: int
    num_aborted: int
    # Given up by the engine after they were queued.
    num_refused: int
    num_steps: int
    # Of prompts, and of answers that began elsewhere.
    num_prompt_tokens: int
    # Of these, ones whose KV was found in the prefix cache.
    num_cached_prompt_tokens: int
    num_output_tokens: int
