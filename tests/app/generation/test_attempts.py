"""What is tried next, and for how long: a request that ends its engines, and those beside it."""

import asyncio

import pytest

from app.generation.attempts import MAX_LOSSES, MAX_PAUSE_S, Attempts
from slora_core.errors import EngineDeadError, EngineFaultError, StoreFullError, StoreGoneError
from slora_core.requests import TRIAL_TOKENS, Delta, Request, SamplingParams
from tests.virtual_time import run_in_virtual_time

TIMEOUT_S = 60.0
REQUEST = Request([1, 2], SamplingParams(max_tokens=100), request_id="r")
CRASH = EngineDeadError("crashed", "one", is_suspect=True)
KILL = EngineDeadError("killed", "one")


async def no_newer(record, error):
    raise AssertionError("the request has no adapter")


def attempts(**fields):
    return Attempts(REQUEST, None, no_newer, fields.get("timeout_s", TIMEOUT_S))


def run(scenario):
    run_in_virtual_time(scenario())


def tokens(*token_ids):
    return Delta("r", [*token_ids])


def test_a_request_that_two_engines_ended_over_is_refused_with_its_id():
    async def scenario():
        tried = attempts()
        tried.received(tokens(7))
        await tried.after(CRASH)
        assert tried.request.is_suspect and tried.request.output_ids == [7]
        assert tried.avoid_replica == "one"
        tried.received(tokens())
        with pytest.raises(EngineFaultError, match="2 engines ended while they computed request r"):
            await tried.after(CRASH)

    run(scenario)


def test_a_suspect_that_gets_further_is_none_any_more():
    async def scenario():
        tried = attempts()
        await tried.after(CRASH)
        for _ in range(TRIAL_TOKENS - 1):
            tried.received(tokens(7))
        assert tried.request.is_suspect
        tried.received(tokens(8))
        await tried.after(CRASH)
        # For the first time, again.
        assert tried.request.is_suspect
        with pytest.raises(EngineFaultError):
            await tried.after(CRASH)

    run(scenario)


def test_an_engine_that_was_killed_makes_no_suspect():
    async def scenario():
        tried = attempts()
        await tried.after(KILL)
        assert not tried.request.is_suspect
        # What it was suspected of stays.
        await tried.after(CRASH)
        await tried.after(KILL)
        assert tried.request.is_suspect
        with pytest.raises(EngineFaultError):
            await tried.after(CRASH)

    run(scenario)


def test_losses_are_bounded_whatever_came_between():
    async def scenario():
        tried = attempts()
        for index in range(MAX_LOSSES):
            tried.received(tokens(index, index))
            await tried.after(KILL)
        tried.received(tokens(1, 2))
        with pytest.raises(EngineDeadError):
            await tried.after(KILL)

    run(scenario)


def test_the_first_try_elsewhere_is_at_once_and_the_next_ones_after_longer_pauses():
    async def scenario():
        loop = asyncio.get_running_loop()
        tried = attempts()
        pauses = []
        with pytest.raises(EngineDeadError):
            while True:
                before = loop.time()
                await tried.after(KILL)
                pauses.append(loop.time() - before)
        assert pauses[0] == 0.0
        assert pauses == sorted(pauses) and max(pauses) == MAX_PAUSE_S
        assert TIMEOUT_S - MAX_PAUSE_S <= sum(pauses) <= TIMEOUT_S
        # It never was in an engine again, so none ended with it.
        assert tried.request.num_moves == len(pauses) > MAX_LOSSES

    run(scenario)


def test_a_request_with_an_engine_has_no_limit_of_time():
    async def scenario():
        loop = asyncio.get_running_loop()
        tried = attempts()
        assert tried.arrival_timeout_s is None
        await tried.after(KILL)
        assert tried.arrival_timeout_s == TIMEOUT_S
        await asyncio.sleep(TIMEOUT_S - 1)
        assert tried.arrival_timeout_s == pytest.approx(1)
        tried.received(tokens())
        assert tried.arrival_timeout_s is None
        await asyncio.sleep(1000)
        before = loop.time()
        await tried.after(KILL)
        # No token came, so that the next engine has its time.
        assert before < loop.time() < before + MAX_PAUSE_S
        assert tried.arrival_timeout_s is not None

    run(scenario)


def test_a_store_that_ended_is_waited_for():
    async def scenario():
        loop = asyncio.get_running_loop()
        tried = attempts()
        await tried.after(StoreGoneError("gone"))
        assert loop.time() > 0 and tried.request.num_moves == 1
        # So is room, once the request was accepted.
        await tried.after(StoreFullError("full"))
        with pytest.raises(StoreFullError):
            await attempts().after(StoreFullError("full"))

    run(scenario)


def test_no_time_means_no_second_try():
    async def scenario():
        tried = attempts(timeout_s=0.0)
        await tried.after(KILL)
        with pytest.raises(EngineDeadError):
            await tried.after(KILL)

    run(scenario)
