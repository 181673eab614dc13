"""In which order the replicas are tried for one request: affinity first, bounded load.

A pure function of what the router sees. Rendezvous hashing (Thaler and Ravishankar, 1998) gives
each adapter its own order of replicas, so a replica that comes or goes moves only the adapters it
gains or held; the bound on the load (Mirrokni et al., 2018) lets requests spill over. Among the
replicas that an adapter is on, and for the base model among all, a second hash gives each
conversation its own order, so that it finds its prefix. Routers that see the same agree without a
word. It imports nothing of Ray; `serve_router` calls it.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True)
class ReplicaLoad:
    """What the router knows of one replica."""

    # What is hashed: the replica's number within its deployment, which a replacement inherits.
    rank_in_deployment: str
    # Requests it holds, as far as this router knows.
    queue_len: int
    # Whether its engine answers; one that does not is no choice.
    healthy: bool = True


@dataclass(frozen=True)
class RoutingKeys:
    """What of a request its replica depends on."""

    # "" is the base model, which every replica has.
    adapter_id: str = ""
    # The same for prompts that begin alike; "" where there is nothing to be found again.
    conversation: str = ""
    # Replicas that share the adapter's requests; see `spread`.
    width: int = 1


@dataclass(frozen=True)
class LoadBound:
    """How many requests a replica may hold before its keys' requests go elsewhere."""

    # Whatever the others hold.
    spill_queue_len: int = 8
    # Of the mean load, with this request counted.
    spill_factor: float = 1.25

    def of(self, queue_lens: Sequence[int]) -> int:
        mean = (sum(queue_lens) + 1) / max(len(queue_lens), 1)
        return max(self.spill_queue_len, math.ceil(self.spill_factor * mean))


def order_replicas(
    keys: RoutingKeys, replicas: Sequence[ReplicaLoad], bound: LoadBound
) -> list[int]:
    """Indices of the healthy ones of `replicas`, the first choice first.

    First those within the bound among the first `width` of the adapter's order (for the base model
    among all), in the conversation's order, or without one the least loaded first. Then the others
    within the bound in the adapter's order, and at last those beyond it, the least loaded first.
    Equal ones are in random order.
    """
    healthy = [index for index, replica in enumerate(replicas) if replica.healthy]
    limit = bound.of([replicas[index].queue_len for index in healthy])

    def weight(key: str, index: int) -> int:
        return rendezvous_weight(key, replicas[index].rank_in_deployment)

    place: dict[int, int] = dict.fromkeys(healthy, 0)
    if keys.adapter_id:
        by_adapter = sorted(healthy, key=lambda index: -weight(keys.adapter_id, index))
        place = {index: max(0, at - keys.width + 1) for at, index in enumerate(by_adapter)}

    def preference(index: int) -> tuple[float, ...]:
        queue_len = replicas[index].queue_len
        if queue_len >= limit:
            return (len(replicas), queue_len, random.random())
        if keys.conversation:
            # Of those in one place; the others have each a place of their own.
            return (place[index], -weight(f"{keys.adapter_id}/{keys.conversation}", index))
        return (place[index], queue_len, random.random())

    return sorted(healthy, key=preference)


def rendezvous_weight(key: str, rank_in_deployment: str) -> int:
    """How strongly a key prefers a replica, uniform over 64 bits."""
    return int.from_bytes(blake2b(f"{rank_in_deployment}/{key}".encode(), digest_size=8).digest())
