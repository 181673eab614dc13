"""What this process knows of the replicas' load: what they told last, and what it sent itself.

Replicas tell their load with what they send anyway (`slora_core.requests.LoadFigures`), far more
often than Serve asks them. The router lives on a thread of its own and Serve pickles its module by
value, so both it and `generation.client`, which hears the figures, get the one board of the
process by calling `board` within a function. It knows nothing of Ray, adapters and orders.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from slora_core.requests import LoadFigures

# Seconds for which what a replica told this process is better than what Serve asks it for twice a
# second.
FRESH_S = 2.0
# Seconds after which a replica that nothing is heard of and sent to is forgotten.
FORGOTTEN_AFTER_S = 600.0
# Tokens of prompts that wait are work like one more request: some steps of a batch's decoding.
TOKENS_LIKE_A_REQUEST = 1024
# A replica with requests that wait and so few pages free does not start them.
SCARCE_PAGE_SHARE = 0.02


class Estimate(NamedTuple):
    """What a replica is taken to hold now."""

    num_requests: float
    # The same with the prompts that wait, in requests.
    load: float
    is_saturated: bool = False


@dataclass
class _Replica:
    touched_at: float
    # Requests of this process that it holds.
    num_own: int = 0
    # Requests of other processes, when it was last heard of.
    num_others: int = 0
    counted_at: float = float("-inf")
    # What it told last, when, and the tokens of the prompts that it was sent since.
    figures: LoadFigures | None = None
    heard_at: float = float("-inf")
    tokens_sent: int = 0
    is_dead: bool = False


class LoadBoard:
    """Replicas by their id; every method may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._replicas: dict[str, _Replica] = {}

    def heard(self, figures: LoadFigures) -> None:
        """A replica told its load."""
        with self._lock:
            replica = self._count(figures.replica_id, figures.num_requests)
            replica.figures, replica.tokens_sent = figures, 0
            replica.heard_at = replica.touched_at

    def counted(self, replica_id: str, num_requests: int) -> None:
        """A replica told only how many requests it has."""
        with self._lock:
            self._count(replica_id, num_requests)

    def died(self, replica_id: str) -> None:
        """A replica's engine has ended; no replica of this id will have one again."""
        with self._lock:
            self._touched(replica_id).is_dead = True

    def is_dead(self, replica_id: str) -> bool:
        with self._lock:
            replica = self._replicas.get(replica_id)
            return replica is not None and replica.is_dead

    def sent(self, replica_id: str) -> None:
        """A request of this process is on its way to a replica."""
        with self._lock:
            self._touched(replica_id).num_own += 1

    def sent_prompt(self, replica_id: str, num_tokens: int) -> None:
        """So long is the prompt of one that was sent."""
        with self._lock:
            self._touched(replica_id).tokens_sent += num_tokens

    def ended(self, replica_id: str) -> None:
        """A request that was sent has ended there, in whichever way."""
        with self._lock:
            replica = self._touched(replica_id)
            replica.num_own = max(0, replica.num_own - 1)

    def estimate(self, replica_id: str, published_load: float) -> Estimate:
        """What a replica holds; `published_load` are the requests that it last told Serve."""
        with self._lock:
            replica = self._replicas.get(replica_id)
            if replica is None:
                return Estimate(published_load, published_load)
            fresh_since = self._clock() - FRESH_S
            if replica.counted_at < fresh_since:
                num_requests = max(published_load, replica.num_own)
            else:
                num_requests = replica.num_others + replica.num_own
            figures = replica.figures
            if figures is None or replica.heard_at < fresh_since:
                return Estimate(num_requests, num_requests)
            num_tokens = figures.queued_tokens + replica.tokens_sent
            load = num_requests + num_tokens / TOKENS_LIKE_A_REQUEST
            is_scarce = figures.free_page_share < SCARCE_PAGE_SHARE
            return Estimate(num_requests, load, is_scarce and figures.num_waiting > 0)

    def _count(self, replica_id: str, num_requests: int) -> _Replica:
        replica = self._touched(replica_id)
        # Some of the own ones may be on their way to it, in place of which others' are missing.
        replica.num_others = max(0, num_requests - replica.num_own)
        replica.counted_at = replica.touched_at
        return replica

    def _touched(self, replica_id: str) -> _Replica:
        now = self._clock()
        replica = self._replicas.get(replica_id)
        if replica is None:
            self._replicas = {
                known: entry
                for known, entry in self._replicas.items()
                if entry.num_own or now - entry.touched_at < FORGOTTEN_AFTER_S
            }
            replica = self._replicas[replica_id] = _Replica(now)
        replica.touched_at = now
        return replica


_board = LoadBoard()


def board() -> LoadBoard:
    """The board of this process."""
    return _board
