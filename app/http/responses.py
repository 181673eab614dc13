"""The answer to one OpenAI request, whole or as server-sent events.

Owns OpenAI's formats of text, finish reasons and usage. `service` makes answers, `routes` sends
them; reading one runs its generations.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Self

from app.generation.text_stream import Generation, MergedGenerations, PieceSource, TextPiece
from app.http.errors import api_error
from app.http.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionChoice,
    PromptTokensDetails,
    SamplingFields,
    Usage,
)

# Seconds between two comments of a stream that waits: less than proxies wait for a sign of life.
COMMENT_EVERY_S = 5.0

_COMMENT = b": the request waits\n\n"
# Stands for a piece's text where an event is written once for many of them.
_TEXT_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
# Ends the JSON of an event, and the event.
_EVENT_END = b"}\n\n"


class Answer:
    """The generations of one request and how its answer is written."""

    def __init__(
        self, request: SamplingFields, generations: Sequence[Generation], answer_id: str
    ) -> None:
        self.id = answer_id
        self._created = int(time.time())
        self._request = request
        self._generations = generations
        self._source: PieceSource = (
            generations[0] if len(generations) == 1 else MergedGenerations(generations)
        )
        self._first: asyncio.Task[TextPiece | None] | None = None

    async def start(self, timeout_s: float | None = None) -> Self:
        """Wait for the first piece, so that an early error can have a status of its own.

        After `timeout_s` the answer goes on without it. Whoever starts an answer closes it.

        Raises:
            SLoRAError: what the answer failed with.
        """
        self._first = asyncio.create_task(self._source.next_piece())
        await asyncio.wait({self._first}, timeout=timeout_s)
        if self._first.done():
            self._first.result()
        return self

    async def close(self) -> None:
        """Abort what still runs."""
        if self._first is not None and not self._first.done():
            self._first.cancel()
            await asyncio.wait({self._first})
        await self._source.close()

    async def collect(self) -> Completion | ChatCompletion:
        """The whole answer at once."""
        texts = [""] * len(self._generations)
        reasons: list[str | None] = [None] * len(self._generations)
        try:
            while (piece := await self._source.next_piece()) is not None:
                texts[piece.choice] += piece.text
                reasons[piece.choice] = piece.finish_reason
        finally:
            await self.close()
        model, usage = self._request.model, self._usage()
        if isinstance(self._request, ChatCompletionRequest):
            message = AssistantMessage(content=texts[0])
            choice = ChatChoice(index=0, message=message, finish_reason=reasons[0])
            return ChatCompletion(
                id=self.id, created=self._created, model=model, choices=[choice], usage=usage
            )
        choices = [
            CompletionChoice(index=index, text=text, finish_reason=reason)
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return Completion(
            id=self.id, created=self._created, model=model, choices=choices, usage=usage
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The body of a stream, begun by `start`: an event a piece, usage where it is asked for.

        Comments until the first piece comes, and for each that says that nothing has come. An error
        becomes an event, and then the end.
        """
        format = EventFormat(self._request, self.id, self._created)
        assert self._first is not None, "the answer was not started"
        is_first = True
        try:
            while not self._first.done():
                yield _COMMENT
                await asyncio.wait({self._first}, timeout=COMMENT_EVERY_S)
            piece = self._first.result()
            while piece is not None:
                if piece.is_nothing:
                    yield _COMMENT
                else:
                    usage = self._usage() if self._request.continuous_usage else None
                    yield format.piece(piece, is_first, usage)
                    is_first = False
                piece = await self._source.next_piece()
            if self._request.include_usage:
                yield format.usage(self._usage())
            yield b"data: [DONE]\n\n"
        except Exception as error:
            await self.close()
            yield f"data: {json.dumps(api_error(error, self.id).body)}\n\n".encode()

    def _usage(self) -> Usage:
        num_prompt = sum(generation.num_prompt_tokens for generation in self._generations)
        num_output = sum(generation.num_output_tokens for generation in self._generations)
        num_cached = sum(generation.num_cached_tokens for generation in self._generations)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_output,
            total_tokens=num_prompt + num_output,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
        )


class EventFormat:
    """Server-sent events of one answer.

    All that two events have in common is written once, by OpenAI's schema, around the mark of a
    text: a stream has an event for every few tokens.
    """

    def __init__(self, request: SamplingFields, answer_id: str, created: int) -> None:
        self._request = request
        self._is_chat = isinstance(request, ChatCompletionRequest)
        self._fields: dict[str, Any] = {
            "id": answer_id,
            "created": created,
            "model": request.model,
        }
        # What is before and after the text, by all that it depends on of a piece; the latter is
        # empty where the event has no text.
        self._frames: dict[tuple[int, bool, bool, str | None], tuple[bytes, bytes]] = {}

    def piece(self, piece: TextPiece, is_first: bool, usage: Usage | None = None) -> bytes:
        """The event of a piece; `is_first` of the answer, in which a chat names the role.

        `usage` is given where every event has it, as it is by then.
        """
        index, text, reason = piece
        key = index, is_first, not text, reason
        frame = self._frames.get(key)
        if frame is None:
            frame = self._frames[key] = self._frame(*key)
        before, after = frame
        event = before
        if after:
            event += json.dumps(text, ensure_ascii=False).encode() + after
        if usage is None:
            return event
        usage_json = usage.model_dump_json().encode()
        return event.removesuffix(_EVENT_END) + b',"usage":' + usage_json + _EVENT_END

    def usage(self, usage: Usage) -> bytes:
        return self._event([], usage, has_usage=True)

    def _frame(
        self, index: int, is_first: bool, is_empty: bool, reason: str | None
    ) -> tuple[bytes, bytes]:
        choice: ChatChunkChoice | CompletionChoice
        if self._is_chat:
            delta = {"role": "assistant"} if is_first else {}
            if is_first or not is_empty:
                delta["content"] = _TEXT_MARK
            choice = ChatChunkChoice(index=0, delta=delta, finish_reason=reason)
        else:
            choice = CompletionChoice(index=index, text=_TEXT_MARK, finish_reason=reason)
        # Null, where the last event alone has usage; `piece` adds it where each event has.
        has_usage = self._request.include_usage and not self._request.continuous_usage
        event = self._event([choice], None, has_usage)
        before, _, after = event.partition(b'"' + _TEXT_MARK.encode() + b'"')
        return before, after

    def _event(
        self,
        choices: list[ChatChunkChoice | CompletionChoice],
        usage: Usage | None,
        has_usage: bool,
    ) -> bytes:
        event_class = ChatCompletionChunk if self._is_chat else Completion
        event = event_class.model_construct(**self._fields, choices=choices, usage=usage)
        exclude = None if has_usage else {"usage"}
        return f"data: {event.model_dump_json(exclude=exclude)}\n\n".encode()
