"""In which order the replicas are tried for one request: affinity first, bounded load.

A pure function of what the router sees. Rendezvous hashing (Thaler and Ravishankar, 1998) gives
each adapter its own order of replicas, so a replica that comes or goes moves only the adapters it
gains or held; the bound on the load (Mirrokni et al., 2018) lets a hot adapter spill over.
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
    # Requests it holds, as far as this router knows.
    queue_len: int
    # Whether its engine answers; one that does not is tried last.
    healthy: bool = True


def order_replicas(
    key: str, replicas: Sequence[ReplicaLoad], spill_queue_len: int, spill_factor: float
) -> list[int]:
    """Indices of `replicas`, the first choice first; an empty key has no affinity.

    With a key, the replicas within the bound come first, in the key's own order; those beyond it
    follow, the least loaded first. The bound is `spill_queue_len` requests or `spill_factor` times
    the mean load with this request counted, whichever is more. Without a key, or where every
    replica is beyond the bound, the least loaded one is first, equal ones in random order.
    """
    usable = [replica for replica in replicas if replica.healthy]
    total = sum(replica.queue_len for replica in usable)
    mean = (total + 1) / max(len(usable), 1)
    bound = max(spill_queue_len, math.ceil(spill_factor * mean))

    def preference(index: int) -> tuple[float, ...]:
        replica = replicas[index]
        if key and replica.healthy and replica.queue_len < bound:
            return (0, -rendezvous_weight(key, replica.rank_in_deployment))
        return (1 if replica.healthy else 2, replica.queue_len, random.random())

    return sorted(range(len(replicas)), key=preference)


def rendezvous_weight(key: str, rank_in_deployment: str) -> int:
    """How strongly a key prefers a replica, uniform over 64 bits."""
    return int.from_bytes(blake2b(f"{rank_in_deployment}/{key}".encode(), digest_size=8).digest())
