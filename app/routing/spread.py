"""Over how many replicas an adapter's requests are spread: as many as their load needs.

Without it a hot adapter fills its replica up to the bound, and cold ones that live there spill with
it. An adapter that has more requests than a replica should take of one is shared by the next
replicas of its order too, and comes back when its load has been lower for a while. Each router
counts its own requests and scales them to what the replicas hold in all, so that several come to
the same number, or near it; nothing depends on their agreement.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

# Of the mean load of a replica, what one adapter may take before it is spread: the rest is for the
# adapters that live there beside it.
SHARE_OF_REPLICA = 0.75
# Seconds for which a lower load does not count: an adapter that is kept need not be loaded again.
HOLD_S = 10.0


class AdapterSpread:
    """Counts running requests by adapter.

    Args:
        spill_queue_len: requests of one adapter that never spread.
        clock: seconds, monotonic.
    """

    def __init__(self, spill_queue_len: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._spill_queue_len = spill_queue_len
        self._clock = clock
        self._adapter_of: dict[str, str] = {}
        self._num_running = Counter[str]()
        # Of spread adapters: their width, and until when it holds.
        self._held: dict[str, tuple[int, float]] = {}

    def started(self, request_id: str, adapter_id: str) -> None:
        """A request was sent to a replica; the base model's count too."""
        self._adapter_of[request_id] = adapter_id
        self._num_running[adapter_id] += 1

    def ended(self, request_id: str) -> None:
        """A request has ended; unknown ones are fine."""
        adapter_id = self._adapter_of.pop(request_id, None)
        if adapter_id is not None:
            self._num_running[adapter_id] -= 1
            if not self._num_running[adapter_id]:
                del self._num_running[adapter_id]

    def width(self, adapter_id: str, queue_lens: Sequence[float]) -> int:
        """Replicas that share the adapter's requests, one more of which has come.

        `queue_lens` are of the healthy replicas: what each holds, of all routers.
        """
        num_replicas = max(1, len(queue_lens))
        own = len(self._adapter_of) + 1
        total = max(sum(queue_lens) + 1, own)
        load = (self._num_running[adapter_id] + 1) * total / own
        fair = max(self._spill_queue_len, SHARE_OF_REPLICA * total / num_replicas)
        needed = min(num_replicas, math.ceil(load / fair))
        return min(num_replicas, self._hold(adapter_id, needed))

    def _hold(self, adapter_id: str, needed: int) -> int:
        """What is needed, or what was a while ago if that is more."""
        now = self._clock()
        held, until = self._held.get(adapter_id, (1, now))
        if needed >= held or now >= until:
            if needed > 1:
                self._held[adapter_id] = needed, now + HOLD_S
            else:
                self._held.pop(adapter_id, None)
            return needed
        return held
