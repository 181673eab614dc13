import asyncio

from app.routing.waiting_line import WaitingLine
from tests.virtual_time import run_in_virtual_time


def test_the_first_to_come_is_the_first_to_be_woken():
    async def main():
        line, woken = WaitingLine(), []

        async def wait(since):
            await line.wait(since, 10)
            woken.append(since)

        tasks = [asyncio.create_task(wait(since)) for since in (3, 1, 2)]
        await asyncio.sleep(1)
        assert woken == [] and len(line) == 3
        for num in (1, 2, 3):
            line.wake()
            await asyncio.sleep(0.1)
            assert woken == [1, 2, 3][:num]
        assert len(line) == 0
        await asyncio.gather(*tasks)

    run_in_virtual_time(main())


def test_a_turn_that_is_of_no_use_is_passed_on():
    async def main():
        line, woken = WaitingLine(), []

        async def wait(since):
            await line.wait(since, 10)
            woken.append(since)

        tasks = [asyncio.create_task(wait(since)) for since in (1, 2, 2, 3)]
        await asyncio.sleep(1)
        line.wake(since=1)
        line.wake(since=1)
        await asyncio.sleep(0.1)
        assert woken == [2, 2]
        line.wake(since=3)
        await asyncio.sleep(0.1)
        assert woken == [2, 2]
        for task in tasks:
            task.cancel()

    run_in_virtual_time(main())


def test_nobody_waits_for_longer_than_asked_or_stays_when_cancelled():
    async def main():
        line, loop = WaitingLine(), asyncio.get_running_loop()
        task = asyncio.create_task(line.wait(0, 100))
        await line.wait(1, 0.25)
        assert loop.time() == 0.25 and len(line) == 1
        task.cancel()
        await asyncio.wait([task])
        assert len(line) == 0
        # Nobody is there.
        line.wake()

    run_in_virtual_time(main())
