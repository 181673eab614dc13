"""Wakings of the long poll, on a clock that jumps."""

import asyncio

from app.registry.long_poll import WAKE_EVERY_S, LongPoll
from tests.virtual_time import run_in_virtual_time


def test_one_change_alone_is_told_of_at_once() -> None:
    async def main():
        poll, changes, now = LongPoll(), [], asyncio.get_running_loop().time
        waiting = [asyncio.create_task(poll.wait(lambda: bool(changes), 30)) for _ in range(20)]
        await asyncio.sleep(3)
        changes.append(1)
        poll.announce()
        await asyncio.gather(*waiting)
        assert now() == 3

    run_in_virtual_time(main())


def test_a_wait_ends_in_time_where_nothing_changes() -> None:
    async def main():
        poll, now = LongPoll(), asyncio.get_running_loop().time
        waiting = asyncio.create_task(poll.wait(lambda: False, 10))
        await asyncio.sleep(2)
        # It may have changed nothing.
        poll.announce()
        await waiting
        assert now() == 10

    run_in_virtual_time(main())


def test_a_follower_that_is_behind_is_answered_at_once() -> None:
    async def main():
        poll, now = LongPoll(), asyncio.get_running_loop().time
        poll.announce()
        await asyncio.sleep(5)
        await poll.wait(lambda: True, 10)
        assert now() == 5

    run_in_virtual_time(main())


def test_a_burst_wakes_followers_a_few_times_a_second_and_starves_none() -> None:
    async def main():
        loop = asyncio.get_running_loop()
        poll, num_changes, heard = LongPoll(), 0, []

        async def follow():
            position = 0
            while position < 5000:
                await poll.wait(lambda known=position: known != num_changes, 10)
                position = num_changes
                heard.append((position, loop.time()))

        following = asyncio.create_task(follow())
        for _ in range(5000):
            await asyncio.sleep(0.01)
            num_changes += 1
            poll.announce()
        await following
        took_s = loop.time()
        assert took_s < 50 + 2 * WAKE_EVERY_S
        assert len(heard) <= took_s / WAKE_EVERY_S + 2
        gaps = [later - before for (_, before), (_, later) in zip(heard, heard[1:], strict=False)]
        assert max(gaps) < 2 * WAKE_EVERY_S

    run_in_virtual_time(main())
