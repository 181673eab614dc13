"""One prompt on its way to text: tokens from the engine in, pieces of text out.

Owns detokenization, stop strings, the count of tokens and the second try where an adapter was
replaced on the way. It knows nothing of HTTP or of OpenAI's formats; `completions` makes those.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from app.generation.replica_protocol import GenerateRequest, TokenChunk
from app.registry.follower import RegistryView
from slora_core.errors import (
    AdapterNotFoundError,
    EngineDeadError,
    InvalidAdapterError,
    InvalidRequestError,
)
from slora_core.requests import FinishReason
from slora_core.text.detokenizer import Decode, Detokenizer


class Engine(Protocol):
    """What a generation needs of `engine_client.EngineClient`."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]: ...


@dataclass(frozen=True)
class TextPiece:
    """New text of one prompt; the last piece has a finish reason and may be empty."""

    index: int
    text: str
    finish_reason: str | None


class Generation:
    """Runs one request; `pieces` may be called once.

    `is_end` tells the token ids that end a text without being part of it, beside the request's
    own `stop_token_ids`.
    """

    def __init__(
        self,
        index: int,
        request: GenerateRequest,
        engine: Engine,
        registry: RegistryView,
        decode: Decode,
        is_end: Callable[[int], bool],
    ) -> None:
        self.index = index
        self.num_prompt_tokens = len(request.prompt_ids)
        self.num_output_tokens = 0
        self._request = request
        self._engine = engine
        self._registry = registry
        self._decode = decode
        self._is_end = is_end

    async def pieces(self) -> AsyncGenerator[TextPiece, None]:
        """Text as it comes; closing it aborts the request in the engine.

        Raises:
            SLoRAError: as `EngineClient.generate`.
        """
        params = self._request.params
        detokenizer = Detokenizer(self._decode, params.stop)
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                token_ids = chunk.token_ids
                reason = chunk.finish_reason
                num_hidden = 0
                if reason == FinishReason.STOP and token_ids and self._ends_text(token_ids[-1]):
                    num_hidden = 1
                text = detokenizer.push(token_ids[: len(token_ids) - num_hidden])
                if reason is not None and not detokenizer.stopped:
                    text += detokenizer.finish()
                self.num_output_tokens = detokenizer.num_tokens
                if detokenizer.stopped:
                    reason = FinishReason.STOP.value
                else:
                    self.num_output_tokens += num_hidden
                if text or reason is not None:
                    yield TextPiece(self.index, text, reason)
                if reason is not None:
                    return

    def _ends_text(self, token_id: int) -> bool:
        return token_id in self._request.params.stop_token_ids or self._is_end(token_id)

    async def _chunks(self) -> AsyncGenerator[TokenChunk, None]:
        """The engine's chunks; once more if the adapter was replaced since it was looked up."""
        request = self._request
        for is_retry in (False, True):
            has_started = False
            try:
                async with aclosing(self._engine.generate(request)) as chunks:
                    async for chunk in chunks:
                        if chunk.finish_reason == FinishReason.ABORT:
                            raise EngineDeadError("the engine gave the request up")
                        has_started = True
                        yield chunk
                return
            except (AdapterNotFoundError, InvalidAdapterError) as error:
                record = request.record
                if has_started or record is None:
                    raise
                await self._registry.refresh()
                newer = await self._registry.find(record.name)
                if is_retry or newer.adapter_id == record.adapter_id:
                    # Its files are gone or changed, and nobody has loaded them anew.
                    raise InvalidRequestError(str(error), "model") from error
                request = replace(request, record=newer)


async def merge(generations: Sequence[Generation]) -> AsyncGenerator[TextPiece, None]:
    """Pieces of several generations as they come; one that fails ends them all."""
    if len(generations) == 1:
        async with aclosing(generations[0].pieces()) as pieces:
            async for piece in pieces:
                yield piece
        return
    queue: asyncio.Queue[TextPiece | BaseException | None] = asyncio.Queue()

    async def run(generation: Generation) -> None:
        try:
            async with aclosing(generation.pieces()) as pieces:
                async for piece in pieces:
                    queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(run(generation)) for generation in generations]
    num_left = len(tasks)
    try:
        while num_left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
