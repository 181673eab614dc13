"""How much waits for its first token, and how long that will take.

Owns the bound of what one ingress has accepted and not begun, in requests and in prompt tokens,
wherever they wait: for a replica, in its engine's queue or for its step. What is refused is told
when to come again, by the rate at which requests have begun lately. It knows no replicas.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from slora_core.errors import OverloadedError

# Seconds over which the rate is measured: longer than prompts take that are computed together,
# shorter than a load lasts.
RATE_WINDOW_S = 10
# What a client may be told, seconds; the former too where nothing has begun lately.
DEFAULT_RETRY_AFTER_S = 5
MAX_RETRY_AFTER_S = 60


class Backlog:
    """Args:
    max_requests, max_tokens: that may wait, prompts' tokens; one request may always.
    clock: seconds, monotonic.
    """

    def __init__(
        self, max_requests: int, max_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.set_limits(max_requests, max_tokens)
        self._clock = clock
        self.num_requests = self.num_tokens = 0
        # What began in each of the last seconds: requests and tokens, by the second modulo.
        self._begun = [(-1, 0, 0)] * RATE_WINDOW_S

    def set_limits(self, max_requests: int, max_tokens: int) -> None:
        """For requests that come from now on."""
        self._max_requests = max_requests
        self._max_tokens = max_tokens

    def check_room(self) -> None:
        """Whether one more request may wait; to be asked before anything is done for it.

        Raises:
            OverloadedError: it may not.
        """
        if self.num_requests >= self._max_requests:
            raise self._refusal(f"{self.num_requests} requests wait, as many as may")

    @contextmanager
    def waiting(self, num_tokens: int) -> Iterator["Waiting"]:
        """Count a request with so many prompt tokens until it has begun or is left.

        Raises:
            OverloadedError: there is no room for it.
        """
        self.check_room()
        if self.num_tokens and self.num_tokens + num_tokens > self._max_tokens:
            raise self._refusal(
                f"prompts of {self.num_tokens} tokens wait, and {self._max_tokens} may"
            )
        waiting = Waiting(self, num_tokens)
        self._add(1, num_tokens)
        try:
            yield waiting
        finally:
            if not waiting.has_begun:
                self._add(-1, -num_tokens)

    def begun(self, num_tokens: int) -> None:
        """A request has its first token; `Waiting` tells of it."""
        self._add(-1, -num_tokens)
        second = int(self._clock())
        index = second % RATE_WINDOW_S
        at, requests, tokens = self._begun[index]
        if at != second:
            requests = tokens = 0
        self._begun[index] = second, requests + 1, tokens + num_tokens

    def retry_after_s(self) -> int:
        """Seconds in which what waits now will have begun."""
        first = int(self._clock()) - RATE_WINDOW_S
        begun = [entry for entry in self._begun if entry[0] > first]
        num_requests = sum(requests for _, requests, _ in begun)
        num_tokens = sum(tokens for _, _, tokens in begun)
        if not num_requests:
            return DEFAULT_RETRY_AFTER_S
        # Of a load that has only just begun, the seconds that it has lasted.
        window_s = int(self._clock()) - min(second for second, _, _ in begun) + 1
        needed_s = window_s * max(
            self.num_requests / num_requests, self.num_tokens / max(1, num_tokens)
        )
        return min(max(1, math.ceil(needed_s)), MAX_RETRY_AFTER_S)

    def _add(self, num_requests: int, num_tokens: int) -> None:
        self.num_requests += num_requests
        self.num_tokens += num_tokens

    def _refusal(self, reason: str) -> OverloadedError:
        retry_after_s = self.retry_after_s()
        return OverloadedError(
            f"the server is overloaded: {reason}; try again in {retry_after_s} s", retry_after_s
        )


class Waiting:
    """One request of a backlog."""

    def __init__(self, backlog: Backlog, num_tokens: int) -> None:
        self._backlog = backlog
        self._num_tokens = num_tokens
        self.has_begun = False

    def begin(self) -> None:
        """It has its first token; may be called again."""
        if not self.has_begun:
            self.has_begun = True
            self._backlog.begun(self._num_tokens)
