"""Which adapters were asked for of late, for a new replica that should have the hottest ones.

Owns a count for each adapter that halves every few minutes. Pure; `load_meter` counts, `warm_up`
of another replica reads.
"""

from collections.abc import Callable

from app.registry.state import AdapterRecord

# Seconds in which a request's weight halves.
HALF_LIFE_S = 300.0
# After so many of these counts are brought back to size.
MAX_HALVINGS = 300
# Adapters that are counted, and those that are told.
MAX_COUNTED = 4096
MAX_TOLD = 256


class AdapterHeat:
    """Requests by adapter; the old ones count less."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_at = clock()
        # Weights grow instead of all counts falling.
        self._counts: dict[str, tuple[float, AdapterRecord]] = {}

    def add(self, record: AdapterRecord) -> None:
        """Count a request for an adapter."""
        weight = self._weight()
        count = self._counts.get(record.adapter_id, (0.0, record))[0]
        self._counts[record.adapter_id] = (count + weight, record)
        if len(self._counts) > MAX_COUNTED:
            self._start_anew()

    def hottest(self) -> list[tuple[float, AdapterRecord]]:
        """Requests of late and the adapter, the most asked for first."""
        now = self._weight()
        ranked = sorted(self._counts.values(), key=lambda counted: -counted[0])
        return [(count / now, record) for count, record in ranked[:MAX_TOLD]]

    def _weight(self) -> float:
        """What a request counts now, where one at the beginning counts 1."""
        if self._clock() - self._began_at > MAX_HALVINGS * HALF_LIFE_S:
            self._start_anew()
        return float(2.0 ** ((self._clock() - self._began_at) / HALF_LIFE_S))

    def _start_anew(self) -> None:
        """Keep the hotter half, with counts as of now."""
        now = self._clock()
        part_left = 2.0 ** ((self._began_at - now) / HALF_LIFE_S)
        ranked = sorted(self._counts.items(), key=lambda item: -item[1][0])
        self._began_at = now
        self._counts = {
            adapter_id: (count * part_left, record)
            for adapter_id, (count, record) in ranked[: MAX_COUNTED // 2]
        }
