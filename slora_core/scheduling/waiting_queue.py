"""Requests that wait to start, and in which order they do.

A scheduling policy is a class here: the scheduler asks for the next request and starts it once it
fits. It knows neither pages nor adapters.
"""

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
    """First come, first served; preempted requests go before all that never ran."""

    def __init__(self) -> None:
        self._requests: OrderedDict[RequestState, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._requests)

    def add(self, request: RequestState) -> None:
        self._requests[request] = None

    def put_back(self, request: RequestState) -> None:
        self._requests[request] = None
        self._requests.move_to_end(request, last=False)

    def head(self) -> RequestState | None:
        return next(iter(self._requests), None)

    def remove(self, request: RequestState) -> None:
        del self._requests[request]
