"""The tokens of running requests on their way to who reads them, gathered into few deltas.

What a stream costs its readers is per delta, not per token. So a request's first token and its end
are handed over at once, and what comes between on one timer for all streams. One event loop; knows
no engine and no connection.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from slora_core.errors import SLoRAError
from slora_core.requests import Delta, FinishReason, StepOutput


class DeltaStream:
    """The deltas of one request, for one reader: an iterator, and a context that aborts at its end.

    Iterating ends after the delta with a finish reason or an error, which is not raised.
    """

    def __init__(self, request_id: str, on_close: Callable[["DeltaStream"], None]) -> None:
        self.request_id = request_id
        # When the engine began to compute it, had its first token and ended it, as far as it said:
        # seconds since the epoch.
        self.begun_at: float | None = None
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        # Whether its last delta was read: nothing is left to abort.
        self.has_ended = False
        self._on_close = on_close
        # What has come since the last delta.
        self._token_ids: list[int] = []
        self._num_cached_tokens = 0
        self._ending: FinishReason | SLoRAError | None = None
        self._has_started = False
        # Set when there is something that the reader should have.
        self._is_due = False
        self._reader: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._on_close(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if self.has_ended:
            raise StopAsyncIteration
        if not self._is_due:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        token_ids, self._token_ids = self._token_ids, []
        num_cached_tokens, self._num_cached_tokens = self._num_cached_tokens, 0
        if token_ids and isinstance(self._ending, SLoRAError):
            # The error is a delta of its own, due at once.
            return Delta(self.request_id, token_ids, num_cached_tokens=num_cached_tokens)
        self._is_due = False
        self.has_ended = self._ending is not None
        return Delta.of(self.request_id, token_ids, self._ending, num_cached_tokens)

    @property
    def has_begun(self) -> bool:
        """Whether the engine has computed some of it."""
        return self.begun_at is not None

    def push(self, token_id: int, at: float | None) -> bool:
        """Take a token of a step; whether it is the first of several that wait for the timer."""
        self._token_ids.append(token_id)
        if self._has_started:
            return len(self._token_ids) == 1
        self._has_started = True
        self.first_token_at = at
        self.wake()
        return False

    def begin(self, num_cached_tokens: int) -> None:
        """Take what the delta of the first token, which comes next, tells of the prompt."""
        self._num_cached_tokens = num_cached_tokens

    def end(self, ending: FinishReason | SLoRAError, at: float | None = None) -> None:
        if self._ending is None:
            self._ending = ending
            self.ended_at = at
        self.wake()

    def wake(self) -> None:
        """Have the reader take what there is, now or when it asks next."""
        if self._token_ids or self._ending is not None:
            self._is_due = True
            if self._reader is not None and not self._reader.done():
                self._reader.set_result(None)


class DeltaStreams:
    """Open streams by request id.

    Args:
        interval_s: seconds for which tokens gather, by the number of open streams.
        abort: called with the id of a request whose stream is closed before its end.
        on_left: called with that id once the engine has aborted it, had it not ended before.
    """

    def __init__(
        self,
        interval_s: Callable[[int], float],
        abort: Callable[[str], None],
        on_left: Callable[[str], None],
    ) -> None:
        self._interval_s = interval_s
        self._abort = abort
        self._on_left = on_left
        self._streams: dict[str, DeltaStream] = {}
        # Those with tokens that wait for the timer.
        self._gathering: list[DeltaStream] = []
        self._timer: asyncio.TimerHandle | None = None
        # When the timer last went off, the loop's time.
        self._flushed_at = float("-inf")

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request_id: str) -> DeltaStream:
        assert request_id not in self._streams, f"{request_id} is running already"
        stream = self._streams[request_id] = DeltaStream(request_id, self._close)
        return stream

    def take(self, output: StepOutput) -> None:
        """Hand out what a step gave; requests that nobody reads any more are passed over."""
        streams = self._streams
        for request_id, num_cached_tokens in output.cached_tokens.items():
            stream = streams.get(request_id)
            if stream is not None:
                stream.begin(num_cached_tokens)
        for request_id, token_id in zip(output.request_ids, output.token_ids, strict=True):
            stream = streams.get(request_id)
            if stream is not None and stream.push(token_id, output.at):
                self._gathering.append(stream)
        for request_id, ending in output.endings.items():
            stream = streams.get(request_id)
            if stream is not None:
                stream.end(ending, output.at)
            elif ending is FinishReason.ABORT:
                self._on_left(request_id)
        if self._gathering and self._timer is None:
            # From the last time on: where a step takes longer than that, nothing waits.
            loop = asyncio.get_running_loop()
            due_at = self._flushed_at + self._interval_s(len(streams))
            if due_at <= loop.time():
                self._flush()
            else:
                self._timer = loop.call_at(due_at, self._flush)

    def __iter__(self) -> Iterator[DeltaStream]:
        return iter(self._streams.values())

    def begun(self, request_ids: Iterable[str], at: float) -> None:
        """The engine computes these from then on."""
        for request_id in request_ids:
            if (stream := self._streams.get(request_id)) is not None:
                stream.begun_at = at

    def _flush(self) -> None:
        self._timer = None
        self._flushed_at = asyncio.get_running_loop().time()
        gathering, self._gathering = self._gathering, []
        for stream in gathering:
            stream.wake()

    def _close(self, stream: DeltaStream) -> None:
        del self._streams[stream.request_id]
        if not stream.has_ended:
            self._abort(stream.request_id)
