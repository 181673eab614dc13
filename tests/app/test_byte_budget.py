"""Bytes in work never pass the bound, and a large piece has its turn; by counts and not by time."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from app.byte_budget import ByteBudget, ThreadByteBudget
from slora_core.errors import InvalidAdapterError

TIMEOUT_S = 30


def test_a_budget_bounds_the_bytes_in_work_and_keeps_the_order() -> None:
    async def scenario():
        budget = ByteBudget(10)
        in_work, most, order = 0, 0, []

        async def work(nbytes):
            nonlocal in_work, most
            async with budget.taken(nbytes):
                order.append(nbytes)
                in_work += nbytes
                most = max(most, in_work if nbytes <= 10 else 0)
                assert nbytes <= 10 or in_work == nbytes, "too large for it: alone"
                await asyncio.sleep(0.01)
                in_work -= nbytes

        tasks = [asyncio.create_task(work(nbytes)) for nbytes in (6, 4, 3, 30, 2, 5)]
        left = asyncio.create_task(work(7))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(*tasks)
        assert order == [6, 4, 3, 30, 2, 5] and most == 10 and in_work == 0

    asyncio.run(scenario())


def test_one_that_is_larger_than_all_goes_alone() -> None:
    budget = ThreadByteBudget(10)
    with ThreadPoolExecutor(1) as pool:
        with budget.taken(11):
            small = pool.submit(_take, budget, 1)
            assert not wait({small}, timeout=0.05).done
        small.result(TIMEOUT_S)


def test_a_piece_that_fails_gives_its_bytes_back() -> None:
    budget = ThreadByteBudget(10)
    with pytest.raises(InvalidAdapterError), budget.taken(10):
        raise InvalidAdapterError("damaged")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_take, budget, 10).result(TIMEOUT_S)


def test_pieces_of_any_sizes_never_take_more_than_there_is() -> None:
    budget, lock, in_work, most = ThreadByteBudget(10), threading.Lock(), [0], [0]

    def work(nbytes: int) -> None:
        with budget.taken(nbytes):
            with lock:
                in_work[0] += nbytes
                most[0] = max(most[0], in_work[0])
            with lock:
                in_work[0] -= nbytes

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [1 + number % 10 for number in range(2000)], timeout=TIMEOUT_S))
    assert in_work == [0] and most[0] <= 10


def _take(budget: ThreadByteBudget, nbytes: int) -> None:
    with budget.taken(nbytes):
        pass
