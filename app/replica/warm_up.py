"""What a new replica does before it takes requests: the hottest adapters that it will serve.

Asks the replicas that run which adapters were asked for of late, and loads those of them that
routing will send here. It knows no Serve; `server` gives it a way to ask.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from app.registry.state import AdapterRecord
from app.replica.leases import AdapterLeases
from app.routing.order import homes
from app.routing.spread import SHARE_OF_REPLICA
from slora_core.engine.process import AsyncEngine
from slora_core.requests import Request, SamplingParams

logger = logging.getLogger(__name__)

# Part of the pool that is filled: requests come as soon as the replica is ready.
SHARE_OF_POOL = 0.5
# How long the others have to answer, seconds.
ASK_TIMEOUT_S = 3.0
# How many adapters are loaded at a time, and for how long all of it may hold up the start, seconds.
MAX_AT_A_TIME = 8
TIMEOUT_S = 15.0


@dataclass(frozen=True)
class PeerHeat:
    """What a running replica tells."""

    rank_in_deployment: str
    # Requests of late, by adapter.
    hottest: list[tuple[float, AdapterRecord]]


async def hear_hot_adapters(ask: Callable[[], Awaitable[Sequence[object]]]) -> list[PeerHeat]:
    """What those of the running replicas tell that answer `ask` in time."""
    try:
        answers = await asyncio.wait_for(ask(), ASK_TIMEOUT_S)
    except Exception as error:
        # There are none, at the first start.
        logger.info("no replica tells which adapters are hot: %r", error)
        return []
    return [answer for answer in answers if isinstance(answer, PeerHeat)]


def adapters_to_warm(rank: str, peers: Sequence[PeerHeat], num_pages: int) -> list[AdapterRecord]:
    """The adapters whose requests go to the replica of this rank, the hottest first."""
    ranks = sorted({rank, *(peer.rank_in_deployment for peer in peers)})
    heat: dict[str, float] = {}
    records: dict[str, AdapterRecord] = {}
    for peer in peers:
        for requests, record in peer.hottest:
            heat[record.adapter_id] = heat.get(record.adapter_id, 0.0) + requests
            records[record.adapter_id] = record
    # As `spread` has it, of all that was asked for.
    fair = SHARE_OF_REPLICA * sum(heat.values()) / len(ranks)
    chosen, room = [], int(SHARE_OF_POOL * num_pages)
    for adapter_id in sorted(heat, key=lambda adapter_id: (-heat[adapter_id], adapter_id)):
        places = homes(adapter_id, math.ceil(heat[adapter_id] / fair), ranks)
        is_ours = rank in (ranks[place] for place in places)
        if is_ours and records[adapter_id].num_pages <= room:
            room -= records[adapter_id].num_pages
            chosen.append(records[adapter_id])
    return chosen


async def warm_up(
    records: Sequence[AdapterRecord],
    load: Callable[[AdapterRecord], Awaitable[None]],
    timeout_s: float = TIMEOUT_S,
) -> int:
    """Load the adapters; how many there was time for. What fails is left to its first request."""
    limit = asyncio.Semaphore(MAX_AT_A_TIME)
    num_loaded = 0

    async def load_one(record: AdapterRecord) -> None:
        nonlocal num_loaded
        async with limit:
            try:
                await load(record)
            except Exception as error:
                logger.info("adapter %s was not loaded ahead: %r", record.name, error)
            else:
                num_loaded += 1

    tasks = [asyncio.create_task(load_one(record)) for record in records]
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        logger.info("loaded %s of %s hot adapters ahead", num_loaded, len(records))
    return num_loaded


async def load_adapter(record: AdapterRecord, leases: AdapterLeases, engine: AsyncEngine) -> None:
    """Have the engine compute a token with an adapter, which then stays in its pool."""
    request = Request([0], SamplingParams(max_tokens=1), record.adapter_id)
    async with leases.hold(record):
        with engine.generate(request) as stream:
            async for delta in stream:
                if delta.error is not None:
                    raise delta.error
