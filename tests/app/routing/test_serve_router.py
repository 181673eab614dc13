"""Serve's side of the router, with Serve's objects faked: what is asked of it, and when."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.request_router import ReplicaID

from app.routing import load_board
from app.routing.serve_router import AffinityRouter
from app.routing.view import HEALTHY_KEY, MODEL_KEY, RANK_KEY
from slora_core.requests import LoadFigures
from tests.virtual_time import run_in_virtual_time

MAX_ONGOING_REQUESTS = 2


class Router(AffinityRouter):
    """Without what Serve's base class starts."""

    def __init__(self, replicas):
        self._replicas = {replica.replica_id: replica for replica in replicas}
        self.initialize_state()


def make_replica(rank, **stats):
    return SimpleNamespace(
        replica_id=ReplicaID(f"replica-{rank}", DeploymentID("engine")),
        routing_stats={RANK_KEY: str(rank), **stats},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
    )


def make_request(created_at=0.0, session_id="", avoid=None, **fields):
    return SimpleNamespace(
        args=[SimpleNamespace(**{"prompt_ids": (), "conversation": "", "model_key": "", **fields})],
        kwargs={"avoid_replica": avoid} if avoid else {},
        metadata=SimpleNamespace(session_id=session_id, internal_request_id="id"),
        routing_context=SimpleNamespace(should_backoff=False),
        created_at=created_at,
    )


@pytest.fixture(autouse=True)
def fresh_board(monkeypatch):
    monkeypatch.setattr(load_board, "_board", load_board.LoadBoard())


@pytest.fixture
def replicas():
    return [make_replica(0), make_replica(1)]


def ranks(chosen):
    return [replica.routing_stats[RANK_KEY] for [replica] in chosen]


def fill(router, replica, num=MAX_ONGOING_REQUESTS):
    for _ in range(num):
        router.on_sending(replica.replica_id)


def test_each_replica_is_a_list_of_its_own(replicas):
    async def main():
        router, request = Router(replicas), make_request(session_id="a")
        chosen = await router.choose_replicas(replicas, request)
        assert sorted(ranks(chosen)) == ["0", "1"]
        assert request.routing_context.should_backoff
        assert sorted(ranks(await router.choose_replicas(replicas))) == ["0", "1"]

    run_in_virtual_time(main())


def test_dead_avoided_and_full_replicas_are_not_chosen(replicas):
    async def main():
        router = Router(replicas)
        request = make_request(avoid="replica-0")
        assert ranks(await router.choose_replicas(replicas, request)) == ["1"]
        fill(router, replicas[1])
        assert ranks(await router.choose_replicas(replicas, make_request())) == ["0"]
        router.on_request_completed(replicas[1].replica_id, "id")
        replicas[0].routing_stats[HEALTHY_KEY] = False
        assert ranks(await router.choose_replicas(replicas, make_request())) == ["1"]
        replicas[0].routing_stats[HEALTHY_KEY] = True
        # Heard by this process before Serve's next poll.
        load_board.board().died("replica-0")
        assert ranks(await router.choose_replicas(replicas, make_request())) == ["1"]

    run_in_virtual_time(main())


def test_a_request_waits_for_room_and_the_first_to_come_gets_it(replicas):
    async def main():
        router, loop, got = Router(replicas), asyncio.get_running_loop(), []
        for replica in replicas:
            fill(router, replica)

        async def ask(created_at):
            chosen = await router.choose_replicas(replicas, make_request(created_at))
            got.append((created_at, ranks(chosen), round(loop.time(), 3)))
            fill(router, chosen[0][0], 1)

        tasks = [asyncio.create_task(ask(created_at)) for created_at in (3, 1, 2)]
        await asyncio.sleep(0.1)
        assert got == []
        router.on_request_completed(replicas[1].replica_id, "id")
        await asyncio.sleep(0.1)
        # Without waiting for a second look.
        assert got == [(1, ["1"], 0.1)]
        router.on_request_completed(replicas[0].replica_id, "id")
        router.on_request_completed(replicas[0].replica_id, "id")
        await asyncio.gather(*tasks)
        assert [created_at for created_at, _, _ in got] == [1, 2, 3]
        assert got[-1][2] < 0.3

    run_in_virtual_time(main())


def test_a_request_that_cannot_use_the_room_passes_it_on(replicas):
    async def main():
        router = Router(replicas)
        for replica in replicas:
            fill(router, replica)
        picky = asyncio.create_task(
            router.choose_replicas(replicas, make_request(1, avoid="replica-1"))
        )
        other = asyncio.create_task(router.choose_replicas(replicas, make_request(2)))
        await asyncio.sleep(0)
        router.on_request_completed(replicas[1].replica_id, "id")
        await asyncio.sleep(0.01)
        assert other.done() and not picky.done()
        picky.cancel()

    run_in_virtual_time(main())


def test_a_request_that_was_sent_before_is_as_old_as_its_client_says(replicas):
    async def main():
        router, got = Router(replicas), []
        for replica in replicas:
            fill(router, replica)

        async def ask(name, *times):
            request = make_request(times[0], arrived_at=times[1])
            [[replica], *_] = await router.choose_replicas(replicas, request)
            got.append(name)
            fill(router, replica, 1)

        tasks = [asyncio.create_task(ask("new", 7, 6)), asyncio.create_task(ask("moved", 9, 2))]
        await asyncio.sleep(0)
        router.on_request_completed(replicas[0].replica_id, "id")
        await asyncio.sleep(0.01)
        assert got == ["moved"]
        router.on_request_completed(replicas[0].replica_id, "id")
        await asyncio.gather(*tasks)

    run_in_virtual_time(main())


def test_room_that_others_made_is_found_after_a_while(replicas):
    async def main():
        router, loop = Router(replicas), asyncio.get_running_loop()
        for replica in replicas:
            router.on_counted(replica.replica_id, MAX_ONGOING_REQUESTS)
        task = asyncio.create_task(router.choose_replicas(replicas, make_request()))
        await asyncio.sleep(0.1)
        router.on_counted(replicas[0].replica_id, 1)
        assert ranks(await task) == ["0"] and loop.time() < 0.3

    run_in_virtual_time(main())


def test_with_no_replica_alive_a_request_waits_for_one_that_comes(replicas):
    async def main():
        router = Router(replicas)
        for replica in replicas:
            replica.routing_stats[HEALTHY_KEY] = False
        task = asyncio.create_task(router.choose_replicas(replicas, make_request()))
        await asyncio.sleep(30)
        assert not task.done()
        replacement = make_replica(2)
        router._replicas = {replacement.replica_id: replacement}
        assert ranks(await task) == ["2"]

    run_in_virtual_time(main())


def test_the_length_of_a_prompt_counts_once_its_replica_has_told_its_load(replicas):
    router, board = Router(replicas), load_board.board()
    board.heard(LoadFigures("replica-0", 0, 0, 0, 1.0))
    request = make_request(prompt_ids=range(2 * load_board.TOKENS_LIKE_A_REQUEST))
    router.on_sending(replicas[0].replica_id)
    router.on_request_routed(request, replicas[0].replica_id, None)
    assert board.estimate("replica-0", 0) == (1, 3, False)


def test_requests_go_to_replicas_of_their_own_base_model():
    async def main():
        old, new, unasked = (make_replica(rank) for rank in range(3))
        old.routing_stats[MODEL_KEY], new.routing_stats[MODEL_KEY] = "old", "new"
        router = Router([old, new, unasked])

        async def chosen(replicas, request):
            return sorted(ranks(await router.choose_replicas(replicas, request)))

        request = make_request(model_key="new")
        assert await chosen([old, new, unasked], request) == ["1", "2"]
        # It is refused there, with a reason.
        assert await chosen([old], request) == ["0"]
        # Calls of other methods, and requests for whichever model.
        call = make_request()
        call.args = []
        for anyones in (call, make_request(model_key="")):
            assert await chosen([old, new], anyones) == ["0", "1"]

    run_in_virtual_time(main())
