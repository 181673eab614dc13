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
    # Replicas that serve the adapter.
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
    home_preference = _home_preference(affinity, [replicas[i].rank_in_deployment for i in usable])
    preference_at_home = {usable[place]: weight for place, weight in home_preference.items()}

    def preference(index: int) -> tuple[float, ...]:
        replica = replicas[index]
        least_loaded = (replica.load, random.random())
        if replica.load >= bound or replica.is_saturated:
            return (2, *least_loaded)
        if index not in preference_at_home:
            return (1, -rendezvous_weight(affinity.adapter, replica.rank_in_deployment))
        return (0, preference_at_home[index], *least_loaded)

    return sorted((index for index in usable if not replicas[index].is_full), key=preference)


def homes(key: str, num_homes: int, ranks: Sequence[str]) -> list[int]:
    """Which of `ranks` are a key's homes, by position: the first of the key's own order.

    In which order they are given matters to prefixes, which choose by it. It is that in which they
    would have become homes had the replicas come one after another, by number: one that comes then
    takes the place of the last in the key's order, and the others keep theirs.
    """
    weights = [rendezvous_weight(key, rank) for rank in ranks]
    chosen: list[int] = []
    for place in sorted(range(len(ranks)), key=lambda place: (len(ranks[place]), ranks[place])):
        if len(chosen) < num_homes:
            chosen.append(place)
            continue
        last = min(chosen, key=weights.__getitem__)
        if weights[place] > weights[last]:
            chosen[chosen.index(last)] = place
    return chosen


def rendezvous_weight(key: str, rank_in_deployment: str) -> int:
    """How strongly a key prefers a replica, uniform over 64 bits."""
    return int.from_bytes(blake2b(f"{rank_in_deployment}/{key}".encode(), digest_size=8).digest())


def _home_preference(affinity: Affinity, ranks: Sequence[str]) -> dict[int, int]:
    """Homes by their position in `ranks`: the lower the number, the sooner they are tried.

    A prefix chooses by the number of a home, so that it stays with what takes that place; with the
    base model, which is everywhere, by the replica itself.
    """
    prefix = affinity.prefix
    if affinity.adapter:
        places = homes(affinity.adapter, affinity.num_homes, ranks)
        names = {place: f"home {number}" for number, place in enumerate(places)}
    else:
        names = dict(enumerate(ranks))
    return {
        place: -rendezvous_weight(prefix, name) if prefix else 0 for place, name in names.items()
    }
