"""What became of registrations since a follower last heard of them.

Owns how far a follower's knowledge reaches and which names have changed since. It knows no files
and no rules; `table` notes changes here, `registrations` applies them to a copy.
"""

import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from app.registry.state import AdapterRecord

# Names whose last change is remembered. A follower that has missed more is given everything, which
# then is not much more than the changes.
MAX_NAMES = 10_000


class Position(NamedTuple):
    """How far a follower's knowledge reaches."""

    # Of one registry's life: revisions of two cannot be compared.
    epoch: str
    revision: int


@dataclass(frozen=True)
class RegistryChanges:
    """The registrations that changed between two positions, or all there are at one."""

    position: Position
    # Those at this position with the changes applied are those at `position`; None: these are all.
    since: Position | None
    records: Mapping[str, AdapterRecord]
    # Names that mean nothing any more.
    removed: frozenset[str]
    # Pages of the smallest engine's pool; None until one has told.
    num_pool_pages: int | None

    @property
    def is_whole(self) -> bool:
        return self.since is None


class ChangeHistory:
    """Counts changes, and remembers of each name the last one; a change may be of no name."""

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._epoch = uuid.uuid4().hex
        self._revision = 0
        # Revision of the last change by name, the latest at the end.
        self._changed_at: OrderedDict[str, int] = OrderedDict()
        # Of changes up to here nothing is known.
        self._forgotten = 0

    @property
    def position(self) -> Position:
        return Position(self._epoch, self._revision)

    def note(self, *names: str) -> None:
        """These names have changed, as one change."""
        self._revision += 1
        for name in names:
            self._changed_at[name] = self._revision
            self._changed_at.move_to_end(name)
        while len(self._changed_at) > self._max_names:
            _, self._forgotten = self._changed_at.popitem(last=False)

    def since(self, position: Position | None) -> list[str] | None:
        """Names that have changed since a position; None where that is not known any more."""
        if position is None or position.epoch != self._epoch:
            return None
        if not self._forgotten <= position.revision <= self._revision:
            return None
        names = []
        for name in reversed(self._changed_at):
            if self._changed_at[name] <= position.revision:
                break
            names.append(name)
        return names
