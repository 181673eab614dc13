"""A follower's copy of the registrations.

Owns the copy and whether what arrives is news to it: answers to several calls may overtake each
other, and a registry may be replaced by another one meanwhile. Applying changes costs as much as
there are changes. It calls nobody; `follower` and the node's store keep one each.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from app.registry.changes import Position, RegistryChanges
from app.registry.state import AdapterRecord


@dataclass(frozen=True)
class Taken:
    """What a copy learned; adapters that several names mean count once."""

    # Adapter ids that no name means any more.
    gone: frozenset[str]
    # One record of each adapter that is new, or is registered by another record than before.
    news: tuple[AdapterRecord, ...]


class Registrations:
    """Nothing is known before the first whole answer, and then `position` is None."""

    def __init__(self) -> None:
        self.position: Position | None = None
        self.num_pool_pages: int | None = None
        self._records: dict[str, AdapterRecord] = {}
        # The records of each adapter by name, the one that came last at the end.
        self._by_id: dict[str, dict[str, AdapterRecord]] = {}

    @property
    def records(self) -> Mapping[str, AdapterRecord]:
        """By name; changes with every `take`."""
        return self._records

    def has_id(self, adapter_id: str) -> bool:
        """Whether any name means the adapter."""
        return adapter_id in self._by_id

    def adapters(self) -> dict[str, AdapterRecord]:
        """A record of each adapter by its id."""
        return {adapter_id: _last(records) for adapter_id, records in self._by_id.items()}

    def take(self, changes: RegistryChanges) -> Taken | None:
        """Apply an answer of the registry; one that is older than the copy changes nothing.

        None where it does not follow on the copy: the registry must be asked again.
        """
        here, there = self.position, changes.position
        if here is not None and here.epoch == there.epoch and there.revision <= here.revision:
            return Taken(frozenset(), ())
        if changes.since is None:
            removed = self._records.keys() - changes.records.keys()
            changed = [
                record
                for name, record in changes.records.items()
                if self._records.get(name) != record
            ]
        elif here is None or changes.since.epoch != here.epoch or changes.since > here:
            return None
        else:
            removed, changed = set(changes.removed), list(changes.records.values())
        self.position, self.num_pool_pages = there, changes.num_pool_pages
        return self._apply(removed, changed)

    def _apply(self, removed: set[str], changed: list[AdapterRecord]) -> Taken:
        # Of every adapter concerned, the record that stood for it.
        before: dict[str, AdapterRecord | None] = {}
        for name in [*removed, *(record.name for record in changed)]:
            if (old := self._records.pop(name, None)) is not None:
                names = self._by_id[old.adapter_id]
                before.setdefault(old.adapter_id, _last(names))
                del names[name]
        for record in changed:
            names = self._by_id.setdefault(record.adapter_id, {})
            before.setdefault(record.adapter_id, _last(names) if names else None)
            names[record.name] = self._records[record.name] = record
        gone = {adapter_id for adapter_id in before if not self._by_id[adapter_id]}
        for adapter_id in gone:
            del self._by_id[adapter_id]
        news = [
            now
            for adapter_id, old in before.items()
            if adapter_id not in gone and (now := _last(self._by_id[adapter_id])) != old
        ]
        return Taken(frozenset(gone), tuple(news))


def _last(records: dict[str, AdapterRecord]) -> AdapterRecord:
    return records[next(reversed(records))]
