"""One prompt on its way to text: deltas of tokens in, pieces of text out.

Owns detokenization, stop strings and the count of tokens. It knows nothing of HTTP or of OpenAI's
formats, and of engines only the deltas that they give.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from app.generation.course import Course
from app.generation.text_ends import TextEndedError
from slora_core.requests import Delta, FinishReason, Request
from slora_core.text.detokenizer import Detokenizer, TextDecoder


class TextPiece(NamedTuple):
    """New text of one prompt; the last piece has a finish reason and may be empty.

    Any other empty one says that the request waits, as its client may want to know.
    """

    # Index of the answer's choice that it is of.
    choice: int
    text: str
    finish_reason: FinishReason | None

    @property
    def is_nothing(self) -> bool:
        return not self.text and self.finish_reason is None


class PieceSource(Protocol):
    """One generation, or several as one."""

    async def next_piece(self) -> TextPiece | None:
        """The next piece as soon as there is one; None after the end.

        Raises:
            SLoRAError: as `EngineClient.generate`.
        """

    async def close(self) -> None:
        """Abort what still runs."""


class Generation:
    """The text of one request.

    Args:
        decoder: of the text that follows on its prompt.
        deltas: of the request, not begun; closing them aborts it.
        is_end: whether a token id ends a text without being part of it, beside the request's own
            `stop_token_ids`.
        course: of the request, told how it ends.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        deltas: AsyncGenerator[Delta, None],
        decoder: TextDecoder,
        is_end: Callable[[int], bool],
        course: Course,
    ) -> None:
        self.index = index
        self.course = course
        self.num_prompt_tokens = len(request.prompt_ids)
        self.num_output_tokens = 0
        # Of the prompt, found in the prefix cache; known with the first piece.
        self.num_cached_tokens = 0
        self._deltas = deltas
        sampling = request.sampling
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        self._is_end = is_end
        self._detokenizer = Detokenizer(decoder, sampling.stop, sampling.min_tokens)
        self._has_ended = False

    async def next_piece(self) -> TextPiece | None:
        while not self._has_ended:
            delta = await anext(self._deltas)
            piece = self._push(delta)
            if piece.finish_reason is not None:
                self._has_ended = True
                self.course.finish_reason = piece.finish_reason
                if not delta.is_last:
                    await self._end_by_text()
                await self.close()
            if not (piece.is_nothing and delta.token_ids):
                return piece
        return None

    async def close(self) -> None:
        await self._deltas.aclose()

    async def _end_by_text(self) -> None:
        """Have the request ended, which is over for its client and not for the engine."""
        with suppress(TextEndedError, StopAsyncIteration):
            await self._deltas.athrow(TextEndedError())

    def _push(self, delta: Delta) -> TextPiece:
        _, token_ids, reason, _, num_cached_tokens, _ = delta
        self.num_cached_tokens += num_cached_tokens
        detokenizer = self._detokenizer
        num_hidden = 0
        if reason is FinishReason.STOP and token_ids and self._ends_text(token_ids[-1]):
            num_hidden = 1
        text = detokenizer.push(token_ids[: len(token_ids) - num_hidden])
        if reason is not None and not detokenizer.stopped:
            text += detokenizer.finish()
        self.num_output_tokens = detokenizer.num_tokens
        if detokenizer.stopped:
            reason = FinishReason.STOP
        else:
            self.num_output_tokens += num_hidden
        return TextPiece(self.index, text, reason)

    def _ends_text(self, token_id: int) -> bool:
        return token_id in self._stop_token_ids or self._is_end(token_id)


class MergedGenerations:
    """Pieces of several generations as they come; one that fails ends them all."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self._generations = generations
        # None for each generation that has ended.
        self._pieces: asyncio.Queue[TextPiece | Exception | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._num_left = len(generations)

    async def next_piece(self) -> TextPiece | None:
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._run(g)) for g in self._generations]
        while self._num_left:
            item = await self._pieces.get()
            if isinstance(item, Exception):
                raise item
            if item is not None:
                return item
            self._num_left -= 1
        return None

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for generation in self._generations:
            await generation.close()

    async def _run(self, generation: Generation) -> None:
        try:
            while (piece := await generation.next_piece()) is not None:
                self._pieces.put_nowait(piece)
            self._pieces.put_nowait(None)
        except Exception as error:
            self._pieces.put_nowait(error)
