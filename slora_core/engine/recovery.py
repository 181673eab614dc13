"""Finds which request a failed step is to be blamed on, so that it alone is refused.

An adapter that cannot be copied costs the requests that name it. After any other failure every
request starts anew, one after another: a step that fails then, with one newcomer among requests
that have just been through a step, is the newcomer's fault. Texts do not change by it, since random
numbers depend on seed and index alone. Where nobody can be blamed, or step after step fails, the
engine has to end. Requests of which another engine may have ended come one after another, too: if
this one ends as well, it is known of which. Knows the scheduler; `Engine` tells it of steps.
"""

import logging
from collections import OrderedDict

from slora_core.errors import EngineFaultError
from slora_core.requests import TRIAL_TOKENS, RequestState, StepPlan
from slora_core.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Steps without a failure after which one that nobody was blamed for is forgotten.
FORGET_AFTER_STEPS = 1000

# Failures with no step that ran between them, of which more are no request's fault. So many bad
# requests at once cost their engine its life, and are refused by their client after the second.
MAX_FAILURES_IN_A_ROW = 5


class StepFailedError(Exception):
    """A planned step did not run. `adapter_id` is of the adapter whose copy failed, if one did."""

    def __init__(self, plan: StepPlan, error: Exception, adapter_id: str | None) -> None:
        super().__init__(str(error))
        self.plan = plan
        self.error = error
        self.adapter_id = adapter_id


class Recovery:
    """Requests that wait to be tried, and the one that is: no other starts meanwhile."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._untried: OrderedDict[str, RequestState] = OrderedDict()
        # On trial until it has given so many tokens.
        self._newcomer: RequestState | None = None
        self._num_tokens = 0
        # Whether a step has failed and not all requests have been tried since: none is then started
        # beside them.
        self._has_failed = False
        # Steps left in which a failure is no second chance any more.
        self._num_steps_left = 0
        self._has_just_failed = False
        self._num_in_a_row = 0

    def __len__(self) -> int:
        """Requests that are not tried yet."""
        return len(self._untried)

    @property
    def is_going(self) -> bool:
        """Whether requests are tried."""
        return bool(self._untried) or self._newcomer is not None

    def takes(self, request: RequestState) -> bool:
        """Whether a request that has come has to wait for a trial of its own."""
        return request.request.is_suspect or (self._has_failed and self.is_going)

    def add(self, request: RequestState) -> None:
        """Have a request wait for its trial."""
        self._untried[request.request_id] = request

    def give_back(self, request_id: str) -> None:
        """Leave a request to the scheduler, if it is untried: it is about to be ended there."""
        request = self._untried.pop(request_id, None)
        if request is not None:
            self._scheduler.add(request)

    def before_step(self) -> None:
        """Let the next request start where the one on trial has passed."""
        if not self._has_just_failed:
            self._num_in_a_row = 0
        self._has_just_failed = False
        newcomer = self._newcomer
        if (
            newcomer is not None
            and not newcomer.ended
            and len(newcomer.output_ids) < self._num_tokens
        ):
            return
        self._newcomer = None
        if self._untried:
            _, request = self._untried.popitem(last=False)
            num_given = TRIAL_TOKENS if request.request.is_suspect else 1
            self._newcomer, self._num_tokens = request, len(request.output_ids) + num_given
            self._scheduler.add(request)
            return
        self._has_failed = False
        if self._num_steps_left:
            self._num_steps_left -= 1

    def after_failure(self, failure: StepFailedError) -> None:
        """A step failed before it ran, and no other is in flight.

        Raises:
            Exception: the step's own, where nobody could be blamed for the failure before this one
                either, or where step after step fails.
        """
        self._scheduler.abandon(failure.plan)
        self._has_just_failed = True
        self._num_in_a_row += 1
        if self._num_in_a_row > MAX_FAILURES_IN_A_ROW:
            raise failure.error
        was_going = self._has_failed and self.is_going
        newcomer, self._newcomer = self._newcomer, None
        waiting = [*self._scheduler.take_waiting(), *self._untried.values()]
        self._untried.clear()
        self._has_failed = was_going or failure.adapter_id is None
        # Beside suspects others start, so that only a second failure says whose fault it is.
        is_on_trial = was_going and any(c.request is newcomer for c in failure.plan.chunks)
        if failure.adapter_id is not None:
            blamed = [r for r in waiting if r.adapter_id == failure.adapter_id]
            reason = f"the engine cannot copy the adapter to its device: {failure.error!r}"
        elif is_on_trial:
            blamed = [r for r in waiting if r is newcomer]
            reason = (
                "the engine failed when it computed this request, and not others: "
                f"{failure.error!r}"
            )
        else:
            blamed, reason = [], ""
            self._give_second_chance(failure)
        if is_on_trial:
            self._num_steps_left = 0
        for request in waiting:
            if request in blamed:
                logger.error("request %s is refused", request.request_id, exc_info=failure.error)
                self._scheduler.add(request)
                self._scheduler.refuse(request.request_id, EngineFaultError(reason))
            elif self._has_failed or request.request.is_suspect:
                self._untried[request.request_id] = request
            else:
                self._scheduler.add(request)

    def _give_second_chance(self, failure: StepFailedError) -> None:
        if self._num_steps_left:
            raise failure.error
        self._num_steps_left = FORGET_AFTER_STEPS
        names = ", ".join(chunk.request.request_id for chunk in failure.plan.chunks)
        logger.error(
            "a step failed; its requests are tried again: %s", names, exc_info=failure.error
        )
