"""How many requests of a replica share an adapter or a prefix, as it publishes them.

What keeps a figure that wavers from moving requests to and fro is here: the routers, which add up
those of all replicas in `hot_keys`, have no memory. Pure; `app.replica.load_meter` counts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# Seconds in which a figure follows the requests up and down: a burst should find its replicas
# ready, and what one replica less would have to load again should not go with a lull.
RISE_S = 1.0
FALL_S = 15.0
# What is published stays while the figure is within this of it.
STAYS_ABOVE = 0.75
STAYS_BELOW = 1.1
# Of a key that all requests of a longer one share, only the longer one says something.
EXPLAINED = 0.9


@dataclass
class _Load:
    num_requests: int = 0
    # Request seconds since the last look.
    integral: float = 0.0
    changed_at: float = 0.0
    smoothed: float = 0.0
    published: float = 0.0
    # The next shorter key, of a prefix.
    parent: str | None = None

    def change(self, by: int, now: float) -> None:
        self.integral += self.num_requests * (now - self.changed_at)
        self.num_requests += by
        self.changed_at = now


class KeyLoads:
    """Requests in flight by key.

    Args:
        least: what a key must have to be published.
        most: keys that are published, those with most requests.
        clock: seconds.
    """

    def __init__(self, least: float, most: int, clock: Callable[[], float]) -> None:
        self._least = least
        self._most = most
        self._clock = clock
        self._loads: dict[str, _Load] = {}
        self._looked_at = clock()

    @contextmanager
    def counted(self, keys: Sequence[str]) -> Iterator[None]:
        """Count a request under `keys`, each of which begins with the one before it."""
        now = self._clock()
        for index, key in enumerate(keys):
            load = self._loads.get(key)
            if load is None:
                parent = keys[index - 1] if index else None
                load = self._loads[key] = _Load(changed_at=now, parent=parent)
            load.change(1, now)
        try:
            yield
        finally:
            now = self._clock()
            for key in keys:
                self._loads[key].change(-1, now)

    def published(self) -> dict[str, float]:
        """What routers get; to be called every now and then."""
        now = self._clock()
        elapsed = now - self._looked_at
        if elapsed > 0:
            self._looked_at = now
            # Most keys are of one conversation: those are forgotten with its request.
            means = {key: _look(load, now, elapsed) for key, load in self._loads.items()}
            self._loads = {
                key: load
                for key, load in self._loads.items()
                if load.num_requests or max(means[key], load.published) >= self._least
            }
        shown = {
            key: load.published
            for key, load in self._loads.items()
            if load.published >= self._least
        }
        explained = {
            load.parent
            for key, load in self._loads.items()
            if key in shown and shown[key] >= EXPLAINED * shown.get(load.parent or "", math.inf)
        }
        own = sorted(shown.keys() - explained, key=lambda key: (-shown[key], key))
        return {key: shown[key] for key in own[: self._most]}


def _look(load: _Load, now: float, elapsed: float) -> float:
    """Bring a figure up to date; the mean since the last look."""
    load.change(0, now)
    mean, load.integral = load.integral / elapsed, 0.0
    follows_s = RISE_S if mean > load.smoothed else FALL_S
    load.smoothed += (mean - load.smoothed) * (1 - math.exp(-elapsed / follows_s))
    if not STAYS_ABOVE * load.published <= load.smoothed <= STAYS_BELOW * load.published:
        load.published = round(load.smoothed, 1)
    return mean
