"""In which order the replicas are tried for one request: affinity first, bounded load.

A pure function of what the router sees. Rendezvous hashing (Thaler and Ravishankar, 1998) gives
each key its own order of replicas, so a replica that comes or goes moves only the keys it gains or
held; the bound on the load (Mirrokni et al., 2018) lets what is too much for one spill over.
It imports nothing of Ray; `serve_router` calls it.
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
    # What it holds, in requests; a fraction where long prompts wait.
    load: float
    # Whether it may have requests at all: its engine answers, as far as is known.
    is_usable: bool = True
    # Whether it takes no more requests.
    is_full: bool = False
    # Whether requests wait in it for pages, of which there are hardly any.
    is_saturated: bool = False


@dataclass(frozen=True)
class Affinity:
    """What a request has in common with others, which the same replicas should serve."""

    # The adapter's id; empty for the base model, which every replica has.
    adapter: str = ""
    # Replicas that serve the adapter: the first ones of its own order.
    num_homes: int = 1
    # Which of those has the beginning of the prompt in its cache; empty: no matter.
    prefix: str = ""


def order_replicas(
    affinity: Affinity, replicas: Sequence[ReplicaLoad], spill_queue_len: int, spill_factor: float
) -> list[int]:
    """Indices of the `replicas` that the request may go to, the first choice first.

    First come the homes within the bound, in the order of the prefix or the least loaded first;
    then the others within the bound in the adapter's order; then those beyond it, the least loaded
    first. Equal loads come in random order. The bound is `spill_queue_len` requests or
    `spill_factor` times the mean load with this request counted, whichever is more. Unusable
    replicas are none and have no say; a full one is none, but keeps its keys.
    """
    usable = [index for index, replica in enumerate(replicas) if replica.is_usable]
    if not usable:
        return []
    mean = (sum(replicas[index].load for index in usable) + 1) / len(usable)
    bound = max(spill_queue_len, math.ceil(spill_factor * mean))
    if affinity.adapter:
        usable.sort(key=lambda index: _preference(affinity.adapter, replicas[index]))
        homes = set(usable[: affinity.num_homes])
    else:
        homes = set(usable)

    def preference(index: int) -> tuple[float, ...]:
        replica = replicas[index]
        least_loaded = (replica.load, random.random())
        if replica.load >= bound or replica.is_saturated:
            return (2, *least_loaded)
        if index not in homes:
            return (1, _preference(affinity.adapter, replica))
        if affinity.prefix:
            return (0, _preference(affinity.prefix, replica))
        return (0, *least_loaded)

    return sorted((index for index in usable if not replicas[index].is_full), key=preference)


def homes(key: str, num_homes: int, ranks: Sequence[str]) -> list[str]:
    """The first `num_homes` of `ranks` in a key's own order."""
    return sorted(ranks, key=lambda rank: -rendezvous_weight(key, rank))[:num_homes]


def rendezvous_weight(key: str, rank_in_deployment: str) -> int:
    """How strongly a key prefers a replica, uniform over 64 bits."""
    return int.from_bytes(blake2b(f"{rank_in_deployment}/{key}".encode(), digest_size=8).digest())


def _preference(key: str, replica: ReplicaLoad) -> int:
    return -rendezvous_weight(key, replica.rank_in_deployment)
