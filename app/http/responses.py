"""The answer to one OpenAI request, whole or as events.

Owns OpenAI's formats of text, finish reasons and usage. It starts nothing by itself: reading an
answer runs its generations. `completions` makes answers, `ingress` sends them.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from app.generation.text_stream import Generation, TextPiece, merge
from app.http.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionChoice,
    SamplingFields,
    Usage,
)


class Answer:
    """The generations of one request and how its answer is written."""

    def __init__(
        self, request: SamplingFields, generations: list[Generation], answer_id: str
    ) -> None:
        self.id = answer_id
        self.created = int(time.time())
        self._request = request
        self._generations = generations

    def pieces(self) -> AsyncGenerator[TextPiece, None]:
        """Text as it comes; closing it aborts what still runs."""
        return merge(self._generations)

    async def collect(self) -> Completion | ChatCompletion:
        """The whole answer at once."""
        texts = [""] * len(self._generations)
        reasons: list[str | None] = [None] * len(self._generations)
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                texts[piece.index] += piece.text
                reasons[piece.index] = piece.finish_reason
        model, usage = self._request.model, self._usage()
        if isinstance(self._request, ChatCompletionRequest):
            message = AssistantMessage(content=texts[0])
            choice = ChatChoice(index=0, message=message, finish_reason=reasons[0])
            return ChatCompletion(
                id=self.id, created=self.created, model=model, choices=[choice], usage=usage
            )
        choices = [
            CompletionChoice(index=index, text=text, finish_reason=reason)
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return Completion(
            id=self.id, created=self.created, model=model, choices=choices, usage=usage
        )

    async def events(self, pieces: AsyncGenerator[TextPiece, None]) -> AsyncGenerator[str, None]:
        """JSON of each streamed event: one a piece, and the usage at the end where asked for."""
        is_first = True
        async for piece in pieces:
            yield self._event(self._choices(piece, is_first), None)
            is_first = False
        if self._request.include_usage:
            yield self._event([], self._usage())

    def _choices(
        self, piece: TextPiece, is_first: bool
    ) -> list[ChatChunkChoice] | list[CompletionChoice]:
        if not isinstance(self._request, ChatCompletionRequest):
            choice = CompletionChoice(
                index=piece.index, text=piece.text, finish_reason=piece.finish_reason
            )
            return [choice]
        delta = {"role": "assistant"} if is_first else {}
        if is_first or piece.text:
            delta["content"] = piece.text
        return [ChatChunkChoice(index=0, delta=delta, finish_reason=piece.finish_reason)]

    def _event(
        self, choices: list[ChatChunkChoice] | list[CompletionChoice], usage: Usage | None
    ) -> str:
        is_chat = isinstance(self._request, ChatCompletionRequest)
        event_class = ChatCompletionChunk if is_chat else Completion
        event = event_class.model_construct(
            id=self.id,
            created=self.created,
            model=self._request.model,
            choices=choices,
            usage=usage,
        )
        exclude = None if self._request.include_usage else {"usage"}
        return event.model_dump_json(exclude=exclude)

    def _usage(self) -> Usage:
        num_prompt = sum(generation.num_prompt_tokens for generation in self._generations)
        num_output = sum(generation.num_output_tokens for generation in self._generations)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_output,
            total_tokens=num_prompt + num_output,
        )
