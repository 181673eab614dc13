"""Typed errors travel as values; what is not typed is Ray's."""

import asyncio
import inspect
import pickle

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError, TaskCancelledError

from app.remote_errors import is_actor_death, is_cancellation, result_of, returns_errors
from slora_core.errors import InvalidRequestError


class Remote:
    @returns_errors
    async def answer(self, error: Exception | None = None) -> str:
        """Answers."""
        if error is not None:
            raise error
        return "answer"


def test_a_typed_error_is_returned_and_raised_again():
    async def scenario():
        assert await result_of(Remote().answer()) == "answer"
        returned = await Remote().answer(InvalidRequestError("too long", "prompt"))
        crossed = pickle.loads(pickle.dumps(returned))

        async def call():
            return crossed

        with pytest.raises(InvalidRequestError, match="too long") as error:
            await result_of(call())
        assert error.value.param == "prompt"

    asyncio.run(scenario())


def test_other_errors_are_raised_as_they_are():
    with pytest.raises(KeyError):
        asyncio.run(Remote().answer(KeyError()))


def test_ray_sees_an_async_method():
    """Ray and Serve look at the signature, and at whether a method is a coroutine function."""
    assert inspect.iscoroutinefunction(Remote.answer)
    assert list(inspect.signature(Remote.answer).parameters) == ["self", "error"]


def test_rays_errors_are_told_apart():
    unavailable = ActorUnavailableError("gone", b"x" * 16)
    raised_remotely = RayTaskError("f", "traceback", ActorDiedError()).as_instanceof_cause()
    for error in (ActorDiedError(), unavailable, raised_remotely):
        assert is_actor_death(error) and not is_cancellation(error)
    assert is_cancellation(TaskCancelledError()) and not is_actor_death(TaskCancelledError())
    assert not is_cancellation(asyncio.CancelledError())
