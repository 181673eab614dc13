"""When the files of an unavailable adapter are looked at again.

At once where they have changed, else after a pause that doubles: a disk that failed for a moment
leaves the files as they were. It reads nothing; `registry` asks it.
"""

import time
from collections.abc import Callable, Container
from dataclasses import dataclass

from app.registry.state import FilesStamp

# Seconds to the first look at unchanged files, and at most between two.
FIRST_PAUSE_S = 10.0
MAX_PAUSE_S = 600.0


@dataclass(frozen=True)
class _Attempt:
    stamp: FilesStamp
    pause_s: float
    due_at: float


class Retries:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._attempts: dict[str, _Attempt] = {}

    def failed(self, name: str, stamp: FilesStamp) -> None:
        """The files that have this stamp could not be used."""
        last = self._attempts.get(name)
        is_same = last is not None and last.stamp == stamp
        pause_s = min(2 * last.pause_s, MAX_PAUSE_S) if last and is_same else FIRST_PAUSE_S
        self._attempts[name] = _Attempt(stamp, pause_s, self._clock() + pause_s)

    def is_due(self, name: str, stamp: FilesStamp) -> bool:
        """Whether files that have this stamp now should be looked at."""
        last = self._attempts.get(name)
        return last is None or last.stamp != stamp or self._clock() >= last.due_at

    def keep_only(self, names: Container[str]) -> None:
        """Forget all others: they are there, or nobody wants them any more."""
        attempts = self._attempts.items()
        self._attempts = {name: attempt for name, attempt in attempts if name in names}
