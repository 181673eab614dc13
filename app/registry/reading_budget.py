"""How many bytes of files threads may read at once; whoever asks first is served first.

The twin for threads of `app.store.byte_budget`. It reads nothing; `inspector` asks it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadingBudget:
    """At most `max_bytes` in work, or one piece of any size."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes_in_work = 0
        # Held by who is next in the row: small pieces must not pass a large one for ever.
        self._turn = threading.Lock()
        self._given_back = threading.Condition()

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[None]:
        with self._turn, self._given_back:
            self._given_back.wait_for(lambda: self._has_room(nbytes))
            self._bytes_in_work += nbytes
        try:
            yield
        finally:
            with self._given_back:
                self._bytes_in_work -= nbytes
                self._given_back.notify()

    def _has_room(self, nbytes: int) -> bool:
        return not self._bytes_in_work or self._bytes_in_work + nbytes <= self._max_bytes
