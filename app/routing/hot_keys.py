"""Which adapters and prefixes are too much for one replica, and so where a request belongs.

Made of what the replicas publish (`key_loads`). Every router gets the same figures and remembers
nothing, so all of them spread a hot key over the same replicas with no word between them. Pure;
`serve_router` makes one each time that Serve brings new figures.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from app.routing.order import Affinity
from app.routing.prefixes import prefix_keys, routing_key

# Keys of a replica's routing stats: its requests, smoothed, in all, by adapter and by prefix.
TOTAL_KEY = "smoothed_load"
ADAPTERS_KEY = "adapters"
PREFIXES_KEY = "prefixes"

# Requests that a replica must have of a key to publish it. One conversation is no shared prefix.
LEAST_OF_ADAPTER = 2.0
LEAST_OF_PREFIX = 1.5


class HotKeys:
    """Args:
    routing_stats: of each replica.
    spill_queue_len: requests that are not too many for a replica, whatever the others have.
    """

    def __init__(
        self, routing_stats: Sequence[Mapping[str, Any]], spill_queue_len: int, page_tokens: int
    ) -> None:
        self._page_tokens = page_tokens
        self._num_replicas = len(routing_stats)
        total = sum(stats.get(TOTAL_KEY, 0.0) for stats in routing_stats)
        # What one replica serves alone of one key: its part of all, if that is many.
        share = max(float(spill_queue_len), total / max(self._num_replicas, 1))
        self._num_homes = {
            adapter: math.ceil(load / share)
            for adapter, load in _summed(routing_stats, ADAPTERS_KEY).items()
            if load > share
        }
        # A prefix that is spread over all replicas must still be seen in each, or it would be
        # taken for cold.
        prefix_share = max(share, LEAST_OF_PREFIX * self._num_replicas)
        prefixes = _summed(routing_stats, PREFIXES_KEY)
        self._hot_prefixes = {key for key, load in prefixes.items() if load > prefix_share}

    def num_homes(self, adapter: str) -> int:
        """Replicas that serve an adapter; every one has the base model, ""."""
        return self._num_homes.get(adapter, 1) if adapter else self._num_replicas

    def affinity(self, adapter: str, prompt_ids: Sequence[int]) -> Affinity:
        """Where a request belongs; `adapter` is empty for the base model."""
        num_homes = self.num_homes(adapter)
        if num_homes <= 1:
            return Affinity(adapter)
        keys = prefix_keys(adapter, prompt_ids, self._page_tokens)
        return Affinity(adapter, num_homes, routing_key(keys, self._hot_prefixes))


def _summed(routing_stats: Iterable[Mapping[str, Any]], kind: str) -> dict[str, float]:
    """What all replicas together have of each key."""
    total: dict[str, float] = {}
    for stats in routing_stats:
        for key, load in stats.get(kind, {}).items():
            total[key] = total.get(key, 0.0) + load
    return total
