"""Thousands of requests over virtual time, through routers that know different things."""

import random
from collections import Counter, defaultdict

import pytest

from app.routing.hot_keys import ADAPTERS_KEY, TOTAL_KEY
from app.routing.load_board import LoadBoard
from app.routing.order import homes
from app.routing.view import RANK_KEY, RouterView, SeenReplica
from tests.app.routing.simulation import PAGE_TOKENS, SPILL_FACTOR, SPILL_QUEUE_LEN, World

COLD = [f"cold-{number}" for number in range(40)]


def prompt(num_tokens, *seed):
    drawn = random.Random(repr(seed))
    return [drawn.randrange(30_000) for _ in range(num_tokens)]


def poisson(world, rate, seconds, send):
    """Calls `send` so often a second, at random, from now on."""
    at = world.random.expovariate(rate)
    while at < seconds:
        world.at(at, send)
        at += world.random.expovariate(rate)


def adapters_load(world, seconds, hot_rate, cold_rate):
    def ask(names):
        name = world.random.choice(names)
        world.send(name, prompt(64, world.random.random()), world.random.uniform(1, 3), name)

    if hot_rate:
        poisson(world, hot_rate, seconds, lambda: ask(["hot"]))
    poisson(world, cold_rate, seconds, lambda: ask(COLD))
    world.run(seconds)


def ranks_of(world, requests, least_share=0.05):
    """Ranks of the replicas with that share of the requests."""
    counts = Counter(request.replica.rank for request in requests)
    return {rank for rank, num in counts.items() if num >= least_share * sum(counts.values())}


def ended_since(world, since, label):
    return [r for r in world.done if r.label == label and r.arrived_at >= since]


def test_a_hot_adapter_gets_the_homes_that_it_needs_and_comes_back():
    world = World(num_replicas=4, num_routers=3)
    adapter_id = "hot-v1"
    ranks = list("0123")

    def homes_of(number):
        return {ranks[place] for place in homes(adapter_id, number, ranks)}

    # 120 of 200 requests in flight are for one adapter: more than two replicas' parts.
    adapters_load(world, 60, hot_rate=60, cold_rate=40)
    hot = ended_since(world, 30, "hot")
    assert len(hot) > 1500 and ranks_of(world, hot) == homes_of(3)
    # Each router does so by itself, and a cold adapter stays where it is, but for what spills.
    for router in world.routers:
        assert ranks_of(world, [r for r in hot if r.router is router]) == homes_of(3)
    stayed = total = 0
    for name in COLD:
        counts = Counter(r.replica.rank for r in ended_since(world, 30, name))
        stayed, total = stayed + counts.most_common(1)[0][1], total + sum(counts.values())
    assert stayed >= 0.8 * total
    # Most of it has gone.
    adapters_load(world, 90, hot_rate=2, cold_rate=40)
    assert ranks_of(world, ended_since(world, world.now - 40, "hot"), 0.2) == homes_of(1)
    assert {router.view._hot.num_homes(adapter_id) for router in world.routers} == {1}


def test_homes_do_not_come_and_go_with_a_wavering_load():
    world = World(num_replicas=4, num_routers=2, seed=1)
    adapters_load(world, 30, hot_rate=35, cold_rate=65)
    changes, before = 0, None
    for _ in range(120):
        adapters_load(world, 1, hot_rate=35, cold_rate=65)
        now = world.routers[0].view._hot.num_homes("hot-v1")
        changes, before = changes + (now != before), now
    # 70 of 200 in flight, plus or minus 8, where 50 are a replica's part.
    assert before == 2 and changes == 1


def test_conversations_stay_with_their_prefix_behind_a_shared_system_prompt():
    world = World(num_replicas=4, num_routers=3)
    system = prompt(24 * PAGE_TOKENS, "system")
    turns_of = defaultdict(list)

    def turn(number, tokens, num_left):
        turns_of[number].append(len(world.done))
        world.send("", tokens, world.random.uniform(1, 3), number)
        if num_left:
            longer = tokens + prompt(80, number, num_left)
            world.at(world.random.uniform(4, 8), turn, number, longer, num_left - 1)

    for number in range(600):
        first = system + prompt(60, number)
        world.at(world.random.uniform(0, 90), turn, number, first, 7)
    world.run(180)
    assert len(world.done) == 600 * 8
    by_label = defaultdict(list)
    for request in sorted(world.done, key=lambda request: request.arrived_at):
        by_label[request.label].append(request)
    # From the third turn on a conversation has an eighth of its own.
    busy = [turns[2:] for turns in by_label.values() if 20 < turns[2].arrived_at < 90]
    pairs = [pair for turns in busy for pair in zip(turns, turns[1:], strict=False)]
    stayed = sum(one.replica is other.replica for one, other in pairs)
    # The rest spilled, and came back.
    assert len(pairs) > 1500 and stayed >= 0.92 * len(pairs)
    assert {one.router is other.router for one, other in pairs} == {True, False}
    # No replica has them all.
    counts = Counter(turn.replica.rank for turns in busy for turn in turns)
    assert len(counts) == 4 and max(counts.values()) < 1.5 * min(counts.values())


def test_a_document_with_few_readers_is_in_one_cache():
    world = World(num_replicas=4, num_routers=2)
    documents = [prompt(40 * PAGE_TOKENS, "document", number) for number in range(60)]

    def ask():
        number = world.random.randrange(60)
        question = prompt(40, world.random.random())
        world.send("", documents[number] + question, world.random.uniform(1, 2), number)

    poisson(world, 60, 60, ask)
    world.run(70)
    by_document = defaultdict(Counter)
    for request in world.done:
        by_document[request.label][request.replica.rank] += 1
    at_home = sum(max(counts.values()) for counts in by_document.values())
    # The rest spilled from replicas that had more than a quarter over the mean.
    assert len(world.done) > 3000 and at_home > 0.9 * len(world.done)


def test_no_request_goes_to_a_dead_replica_while_another_lives():
    world = World(num_replicas=3, num_routers=2)
    victim = next(iter(world.replicas.values()))
    adapters_load(world, 20, hot_rate=20, cold_rate=20)
    world.kill(victim)
    since = world.now
    sent = [router.num_sent.total() for router in world.routers]
    adapters_load(world, 20, hot_rate=20, cold_rate=20)
    late = sum(num for r in world.routers for (_, i), num in r.num_sent.items() if i == victim)
    assert late == 0 and all(
        router.num_sent.total() > before for router, before in zip(world.routers, sent, strict=True)
    )
    assert not any(
        request.replica is victim for request in world.done if request.arrived_at > since
    )
    world.run(30)
    assert len(world.done) > 1500 and not any(router.line for router in world.routers)


def test_with_none_alive_requests_wait_for_the_replacement():
    world = World(num_replicas=1, num_routers=2)
    adapters_load(world, 5, hot_rate=5, cold_rate=5)
    [first] = world.replicas.values()
    world.kill(first)
    adapters_load(world, 5, hot_rate=5, cold_rate=5)
    assert sum(len(router.line) for router in world.routers) > 20
    world.remove(first)
    world.add_replica(0)
    world.run(30)
    assert not any(router.line for router in world.routers)


def test_a_full_replica_does_not_slow_requests_of_others():
    """Two small replicas; one has twice the load that it can take."""
    world = World(num_replicas=3, num_routers=2, num_slots=8, max_ongoing_requests=16)
    adapters_load(world, 40, hot_rate=6, cold_rate=3)
    waits = [r.first_token_at - r.arrived_at for r in world.done if r.label != "hot"]
    assert len(waits) > 80 and sorted(waits)[int(0.99 * len(waits))] < 1.5


def test_a_burst_over_full_replicas_is_taken_in_turn():
    world = World(num_replicas=2, num_routers=2, num_slots=8, max_ongoing_requests=16)
    for number in range(400):
        world.at(number / 1000, world.send, "", prompt(64, number), 0.5, number)
    world.run(60)
    assert len(world.done) == 400
    # 16 at a time, of half a second each: little is lost to waiting for a turn.
    assert max(request.first_token_at for request in world.done) < 1 + 1.15 * 400 / 16 * 0.5
    for router in world.routers:
        mine = sorted((r for r in world.done if r.router is router), key=lambda r: r.arrived_at)
        began = sorted(mine, key=lambda request: request.first_token_at)
        # Two that are sent at one time may be told of in either order.
        assert max(abs(mine.index(request) - place) for place, request in enumerate(began)) < 10


def choices(num_replicas, num_hot_homes=2):
    """Where adapters, hot adapters' prompts and the base model's prompts go, with no load."""
    view = RouterView(LoadBoard(), SPILL_QUEUE_LEN, SPILL_FACTOR, PAGE_TOKENS)
    # So much for each hot one that it needs so many replicas of them.
    hot_load = 100.0 * num_hot_homes - 50
    hot = {f"hot-{number}": hot_load / num_replicas for number in range(400)}
    stats = [
        {RANK_KEY: str(rank), TOTAL_KEY: 100.0, ADAPTERS_KEY: hot} for rank in range(num_replicas)
    ]
    view.see(stats)
    seen = [SeenReplica(f"id-{rank}", stat, 10_000) for rank, stat in enumerate(stats)]
    adapters = [view.order(seen, f"cold-{number}", ())[0] for number in range(8000)]
    spread = [
        view.order(seen, adapter, PROMPTS[number])[0] for adapter in hot for number in range(20)
    ]
    base = [view.order(seen, "", tokens)[0] for tokens in PROMPTS]
    return adapters, spread, base


PROMPTS = [prompt(2 * PAGE_TOKENS, "prompt", number) for number in range(8000)]


@pytest.fixture(scope="module")
def chosen():
    return {num_replicas: choices(num_replicas) for num_replicas in (2, 3, 4, 5)}


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 4), (4, 5), (5, 4), (4, 3)])
def test_replicas_that_come_or_go_move_only_their_share(chosen, before, after):
    ideal = 1 / max(before, after)
    for old, new in zip(chosen[before], chosen[after], strict=True):
        moved = sum(one != other for one, other in zip(old, new, strict=True)) / len(old)
        assert moved == pytest.approx(ideal, rel=0.1), (moved, ideal)
