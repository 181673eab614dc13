"""Finds which request a failed step is to be blamed on, so that it alone is refused.

After a failure every request starts anew, one after another: a step that fails then, with one
newcomer among requests that have just been through a step, is the newcomer's fault. Texts do not
change by it, since random numbers depend on seed and index alone. Where nobody can be blamed the
engine has to end. Knows the scheduler; `Engine` tells it of steps.
"""

import logging
from collections import OrderedDict

from slora_core.errors import EngineFaultError
from slora_core.requests import RequestState, StepPlan
from slora_core.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Steps without a failure after which one that nobody was blamed for is forgotten.
FORGET_AFTER_STEPS = 1000


class Recovery:
    """Requests that wait to be tried, and the one that is: no other starts meanwhile."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._untried: OrderedDict[str, RequestState] = OrderedDict()
        # On trial until it has one token more than it had.
        self._newcomer: RequestState | None = None
        self._num_tokens = 0
        # Steps left in which a failure is no second chance any more.
        self._num_steps_left = 0

    def __len__(self) -> int:
        """Requests that are not tried yet."""
        return len(self._untried)

    @property
    def is_going(self) -> bool:
        """Whether requests are tried, so that what comes has to wait for its own trial."""
        return bool(self._untried) or self._newcomer is not None

    def add(self, request: RequestState) -> None:
        """A request that comes while others are tried."""
        self._untried[request.request_id] = request

    def give_back(self, request_id: str) -> None:
        """Leave a request to the scheduler, if it is untried: it is about to be ended there."""
        request = self._untried.pop(request_id, None)
        if request is not None:
            self._scheduler.add(request)

    def before_step(self) -> None:
        """Let the next request start where the one on trial has passed."""
        newcomer = self._newcomer
        is_on_trial = newcomer is not None and not newcomer.ended
        if newcomer is not None and is_on_trial and len(newcomer.output_ids) == self._num_tokens:
            return
        self._newcomer = None
        if self._untried:
            _, request = self._untried.popitem(last=False)
            self._newcomer, self._num_tokens = request, len(request.output_ids)
            self._scheduler.add(request)
        elif self._num_steps_left:
            self._num_steps_left -= 1

    def after_failure(self, plan: StepPlan, error: Exception) -> None:
        """A step failed before it ran, and no other is in flight.

        Raises:
            Exception: `error`, where nobody could be blamed for the failure before this one either.
        """
        self._scheduler.abandon(plan)
        newcomer, self._newcomer = self._newcomer, None
        if newcomer is not None and any(chunk.request is newcomer for chunk in plan.chunks):
            logger.error("request %s is refused", newcomer.request_id, exc_info=error)
            fault = EngineFaultError(
                f"the engine failed when it computed this request, and not others: {error!r}"
            )
            self._scheduler.refuse(newcomer.request_id, fault)
            self._num_steps_left = 0
        elif self._num_steps_left:
            raise error
        else:
            self._num_steps_left = FORGET_AFTER_STEPS
            names = ", ".join(chunk.request.request_id for chunk in plan.chunks)
            logger.error("a step failed; its requests are tried again: %s", names, exc_info=error)
        again = {request.request_id: request for request in self._scheduler.take_waiting()}
        self._untried = OrderedDict(again | self._untried)
