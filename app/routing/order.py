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
    # What it holds, in requests; a fraction where long prompts wait.
    load: float
    # Whether its engine answers; one that does not is no choice.
    healthy: bool = True
    # Whether it takes no more requests: no choice either, but what is at home there stays so.
    is_full: bool = False
    # Whether requests wait in it for pages, of which there are hardly any.
    is_saturated: bool = False


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
    """How much a replica may hold, in requests, before its keys' requests go elsewhere."""

    # Whatever the others hold.
    spill_queue_len: int = 8
    # Of the mean load, with this request counted.
    spill_factor: float = 1.25

    def of(self, loads: Sequence[float]) -> int:
        mean = (sum(loads) + 1) / max(len(loads), 1)
        return max(self.spill_queue_len, math.ceil(self.spill_factor * mean))


def order_replicas(
    keys: RoutingKeys, replicas: Sequence[ReplicaLoad], bound: LoadBound
) -> list[int]:
    """Indices of those of `replicas` that may have the request, the first choice first.

    First those within the bound among the adapter's homes (for the base model among all), in the
    conversation's order, or without one the least loaded first, where of the homes a request more
    or less is no matter. Then the others within the bound in the adapter's order, and at last those
    beyond it, the least loaded first. Equal homes are in the adapter's order, equal others in
    random order. A saturated replica is beyond the bound, whatever it holds.
    """
    healthy = [index for index, replica in enumerate(replicas) if replica.healthy]
    limit = bound.of([replicas[index].load for index in healthy])
    ranks = [replicas[index].rank_in_deployment for index in healthy]
    at_home = {healthy[place]: weight for place, weight in _home_weights(keys, ranks).items()}

    def preference(index: int) -> tuple[float, ...]:
        replica = replicas[index]
        least_loaded = (replica.load, random.random())
        if replica.load >= limit or replica.is_saturated:
            return (2, *least_loaded)
        own_order = -rendezvous_weight(keys.adapter_id, replica.rank_in_deployment)
        if index not in at_home:
            return (1, own_order)
        if keys.adapter_id:
            # What comes after a burst, one request at a time, finds what the one before left.
            return (0, -at_home[index], replica.load // 2, own_order)
        return (0, -at_home[index], *least_loaded)

    return sorted((index for index in healthy if not replicas[index].is_full), key=preference)


def homes(adapter_id: str, width: int, ranks: Sequence[str]) -> list[int]:
    """Which of `ranks` share an adapter's requests, by position: the first of its own order.

    The order in which they are given matters to conversations, which choose by it. It is that in
    which they would have become homes had the replicas come one after another, by number: one that
    comes then takes the place of the last in the adapter's order, and the others keep theirs.
    """
    weights = [rendezvous_weight(adapter_id, rank) for rank in ranks]
    chosen: list[int] = []
    for place in sorted(range(len(ranks)), key=lambda place: (len(ranks[place]), ranks[place])):
        if len(chosen) < width:
            chosen.append(place)
            continue
        last = min(chosen, key=weights.__getitem__)
        if weights[place] > weights[last]:
            chosen[chosen.index(last)] = place
    return chosen


def rendezvous_weight(key: str, rank_in_deployment: str) -> int:
    """How strongly a key prefers a replica, uniform over 64 bits."""
    return int.from_bytes(blake2b(f"{rank_in_deployment}/{key}".encode(), digest_size=8).digest())


def _home_weights(keys: RoutingKeys, ranks: Sequence[str]) -> dict[int, int]:
    """Of the homes, by their position in `ranks`, how strongly a conversation prefers each.

    It chooses by the number of a home, so that it stays with what takes that place; with the base
    model, which is everywhere, by the replica itself.
    """
    if keys.adapter_id:
        places = homes(keys.adapter_id, keys.width, ranks)
        names = {place: f"home {number}" for number, place in enumerate(places)}
    else:
        names = dict(enumerate(ranks))
    if not keys.conversation:
        return dict.fromkeys(names, 0)
    name = f"{keys.adapter_id}/{keys.conversation}"
    return {place: rendezvous_weight(name, home) for place, home in names.items()}
