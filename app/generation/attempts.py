"""What has come of one request, and what is tried next where an attempt at it has failed.

Owns failover: an attempt that lost its engine goes on elsewhere, after the tokens that have come,
so that nothing is given out twice. How often, how soon and for how long is decided here; `client`
sends the attempts. It knows no Serve and no HTTP.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from app.registry.state import AdapterRecord
from slora_core.errors import (
    AdapterNotFoundError,
    AdapterUnavailableError,
    EngineDeadError,
    EngineFaultError,
    InvalidAdapterError,
    InvalidRequestError,
    StoreFullError,
    StoreGoneError,
)
from slora_core.requests import TRIAL_TOKENS, Delta, Request

logger = logging.getLogger(__name__)

# Engines that may end by themselves over a request that gives no token between: it is refused then,
# or it would end them all.
MAX_FAULTS_IN_A_ROW = 2
# Engines that may end with a request at all. Nothing but this bounds what one takes with it that
# has its engine killed from outside, for want of memory, and gets further each time.
MAX_LOSSES = 8

# Seconds before the second attempt in a row without a token, and the longest pause: an engine takes
# seconds to start, and each try costs a replica a millisecond.
FIRST_PAUSE_S = 0.05
MAX_PAUSE_S = 1.0

# What a replica without the adapter says, be it that its name means another version by now.
_ADAPTER_IS_GONE = (AdapterNotFoundError, AdapterUnavailableError, InvalidAdapterError)

# Given an adapter that is gone, and why, what its name means now.
Renew = Callable[[AdapterRecord, Exception], Awaitable[AdapterRecord]]


class Attempts:
    """The attempts at one request; use it on an event loop.

    Args:
        record: of the adapter that the request names.
        failover_timeout_s: how long a request that lost its engine is without one, at most.
    """

    def __init__(
        self,
        request: Request,
        record: AdapterRecord | None,
        renew: Renew,
        failover_timeout_s: float,
    ) -> None:
        # What the next attempt sends, but for its id.
        self.request = request
        self.record = record
        # A replica that just failed it; the router tries it last.
        self.avoid_replica: str | None = None
        self._renew = renew
        self._failover_timeout_s = failover_timeout_s
        self._output_ids = list(request.output_ids)
        # Of these, what the attempts before had given.
        self._num_before = len(self._output_ids)
        # Whether the attempt that runs is in an engine, as far as is known.
        self._has_arrived = True
        self._is_renewed = False
        self._num_losses = self._num_faults_in_a_row = self._num_pauses = 0
        # The loop's time since when it has no engine; None while it has one.
        self._lost_at: float | None = None

    @property
    def arrival_timeout_s(self) -> float | None:
        """How long to wait for the attempt's first delta; None: the queue has no limit of time."""
        if self._lost_at is None:
            return None
        return max(0.0, self._lost_at + self._failover_timeout_s - _now())

    def received(self, delta: Delta) -> None:
        """Something has come, be it no token: the attempt is in an engine."""
        self._has_arrived = True
        self._lost_at = None
        if delta.token_ids:
            self._output_ids += delta.token_ids
            self._num_pauses = 0
            if len(self._output_ids) - self._num_before >= TRIAL_TOKENS:
                self._num_faults_in_a_row = 0

    async def after(self, error: Exception) -> None:
        """Prepare the next attempt after one that failed so, or raise its error; may wait."""
        if isinstance(error, EngineDeadError):
            self._check_deaths(error)
            self.avoid_replica = error.replica_id
            # Another replica may take it at once.
            await self._send_again(error, may_be_at_once=True)
        elif isinstance(error, StoreGoneError) or (
            # Once accepted it is not refused for want of room.
            isinstance(error, StoreFullError) and self.request.num_moves
        ):
            await self._send_again(error, may_be_at_once=False)
        elif isinstance(error, _ADAPTER_IS_GONE):
            await self._renew_adapter(error)
        else:
            raise error

    def _check_deaths(self, error: EngineDeadError) -> None:
        request_id = self.request.request_id
        self._num_losses += self._has_arrived
        self._num_faults_in_a_row += error.is_suspect
        if self._num_faults_in_a_row >= MAX_FAULTS_IN_A_ROW:
            logger.error("request %s is refused: engines end over it: %s", request_id, error)
            raise EngineFaultError(
                f"{self._num_faults_in_a_row} engines ended while they computed request "
                f"{request_id}; it is not tried again"
            ) from error
        if self._num_losses > MAX_LOSSES:
            logger.error("request %s is given up after %d engines", request_id, self._num_losses)
            raise error

    async def _send_again(self, error: Exception, may_be_at_once: bool) -> None:
        """Wait before the next attempt, longer each time, or raise where it would be too late."""
        if self._lost_at is None:
            self._lost_at = _now()
        is_at_once = may_be_at_once and self._num_pauses == 0
        pause_s = 0.0 if is_at_once else min(FIRST_PAUSE_S * 2**self._num_pauses, MAX_PAUSE_S)
        if _now() + pause_s > self._lost_at + self._failover_timeout_s:
            raise error
        self._num_pauses += 1
        self._has_arrived = False
        self._num_before = len(self._output_ids)
        self.request = replace(
            self.request,
            output_ids=[*self._output_ids],
            num_moves=self.request.num_moves + 1,
            is_suspect=self._num_faults_in_a_row > 0,
        )
        logger.warning(
            "request %s is sent again, after %d tokens: %s",
            self.request.request_id,
            self._num_before,
            error,
        )
        await asyncio.sleep(pause_s)

    async def _renew_adapter(self, error: Exception) -> None:
        if self._output_ids or self.record is None:
            # Another version must not write the rest of a text.
            raise error
        if self._is_renewed:
            if isinstance(error, AdapterUnavailableError):
                raise error
            raise InvalidRequestError(str(error), "model") from error
        self._is_renewed = True
        self.record = await self._renew(self.record, error)
        self.request = replace(self.request, adapter_id=self.record.adapter_id)


def _now() -> float:
    return asyncio.get_running_loop().time()
