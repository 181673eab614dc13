"""Joins the tokens of one request into few messages: the first at once, then on a timer.

What a stream costs Serve is per message, not per token. It knows neither engine nor Serve.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable

from slora_core.requests import FinishReason, RequestOutput


async def coalesce(
    outputs: AsyncGenerator[RequestOutput, None], interval_s: Callable[[], float]
) -> AsyncGenerator[tuple[list[int], FinishReason | None], None]:
    """Yield (new token ids, finish reason), at least `interval_s()` apart but for the last.

    `interval_s` is asked after every piece: it may follow the load. Closing it closes `outputs`.
    What `outputs` raises is raised here, after the tokens before it.
    """
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    arrived = asyncio.Event()

    async def collect() -> None:
        nonlocal finish_reason
        try:
            async for output in outputs:
                token_ids.extend(output.new_token_ids)
                finish_reason = output.finish_reason
                arrived.set()
        finally:
            await outputs.aclose()
            arrived.set()

    collector = asyncio.create_task(collect())
    try:
        while not (collector.done() and not token_ids):
            await arrived.wait()
            arrived.clear()
            taken, reason = token_ids.copy(), finish_reason
            token_ids.clear()
            if taken or reason is not None:
                yield taken, reason
            if reason is not None:
                break
            if not collector.done():
                # Ends early when the request does.
                await asyncio.wait({collector}, timeout=interval_s())
            if token_ids:
                arrived.set()
        await collector
    finally:
        collector.cancel()
        await asyncio.gather(collector, return_exceptions=True)
