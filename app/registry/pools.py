"""How large the pools of the living engine replicas are, as they tell again and again."""

import time
from collections.abc import Callable

from app.registry.state import AdapterRecord
from slora_core.errors import AdapterTooLargeError

# How often a replica tells, and for how long it is believed to live after that, seconds.
REPORT_EVERY_S = 10.0
FORGET_AFTER_S = 3.5 * REPORT_EVERY_S

_MIB = 1 << 20


class LivingPools:
    """Args:
    configured_pages: of every pool, where the arguments say; None where engines size their own.
    """

    def __init__(
        self, configured_pages: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._configured_pages = configured_pages
        self._clock = clock
        # By replica: pages, and when it told so.
        self._pools: dict[str, tuple[int, float]] = {}

    @property
    def smallest(self) -> int | None:
        """Pages of the smallest living pool; None until one has told."""
        now = self._clock()
        self._pools = {
            replica: (pages, told_at)
            for replica, (pages, told_at) in self._pools.items()
            if now - told_at < FORGET_AFTER_S
        }
        told = [pages for pages, _ in self._pools.values()]
        return min(told) if told else self._configured_pages

    def report(self, replica_id: str, num_pages: int) -> None:
        self._pools[replica_id] = (num_pages, self._clock())


def check_fits(record: AdapterRecord, num_pool_pages: int | None, page_bytes: int) -> None:
    """Raises AdapterTooLargeError where an adapter leaves a pool no page for a request."""
    if num_pool_pages is not None and record.num_pages >= num_pool_pages:
        mib, pool_mib = (pages * page_bytes / _MIB for pages in (record.num_pages, num_pool_pages))
        raise AdapterTooLargeError(
            f"adapter {record.name!r} takes {record.num_pages} pages ({mib:.2f} MiB) and a request "
            f"at least one more; the pool has {num_pool_pages} pages ({pool_mib:.2f} MiB)"
        )
