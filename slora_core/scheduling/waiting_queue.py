"""Requests that wait to start, and in which order they do.

A scheduling policy is a class here: the scheduler asks for the next request and starts it once it
fits. It knows neither pages nor adapters.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from slora_core.requests import RequestState


class WaitingQueue(Protocol):
    """Every request is in it once, from `add` or `put_back` to `remove`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[RequestState]: ...

    def add(self, request: RequestState) -> None:
        """Take a request that has just come."""

    def put_back(self, request: RequestState) -> None:
        """Take a request that was preempted; put back later, it started earlier."""

    def head(self) -> RequestState | None:
        """The request to start next, which stays here; None where nothing waits.

        While it does not fit nothing else is started, so a policy that would pass it over must
        name another one. Which of the prompts that have started are computed first is not its to
        say: a long one may start some steps before its turn.
        """

    def remove(self, request: RequestState) -> None:
        """Let go of a request: it starts, or will never do."""


class FirstComeQueue:
    """First come, first served.

    Preempted requests go before all that never ran, and after them those that an engine which has
    ended had accepted: their clients have waited longer than any that is new here.
    """

    def __init__(self) -> None:
        self._preempted: OrderedDict[RequestState, None] = OrderedDict()
        self._moved: OrderedDict[RequestState, None] = OrderedDict()
        self._new: OrderedDict[RequestState, None] = OrderedDict()
        self._queues = (self._preempted, self._moved, self._new)

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def __iter__(self) -> Iterator[RequestState]:
        return itertools.chain(*self._queues)

    def add(self, request: RequestState) -> None:
        queue = self._moved if request.request.num_moves else self._new
        queue[request] = None

    def put_back(self, request: RequestState) -> None:
        self._preempted[request] = None
        self._preempted.move_to_end(request, last=False)

    def head(self) -> RequestState | None:
        return next(iter(self), None)

    def remove(self, request: RequestState) -> None:
        for queue in self._queues:
            if request in queue:
                del queue[request]
                return
        raise KeyError(request.request_id)
