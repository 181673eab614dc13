"""How errors cross processes: typed ones as values, all others as Ray has them.

What a remote method raises Ray logs with its traceback, and its caller gets it as a
`RayTaskError`, whose text is that traceback. A typed error is somebody's input and no defect: the
method returns it instead (`returns_errors`), and its caller raises it as itself (`result_of`). A
stream carries one in its last message, see `app.generation.replica_protocol.TokenChunk`. What is
not typed stays Ray's own error; `app.http` asks here which of those it met.
"""

import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from ray.exceptions import RayActorError, TaskCancelledError

from slora_core.errors import SLoRAError

P = ParamSpec("P")
T = TypeVar("T")


def returns_errors(
    method: Callable[P, Awaitable[T]],
) -> Callable[P, Coroutine[Any, Any, T | SLoRAError]]:
    """An async method of an actor or a deployment that returns the typed error it raises."""

    @functools.wraps(method)
    async def returning(*args: P.args, **kwargs: P.kwargs) -> T | SLoRAError:
        try:
            return await method(*args, **kwargs)
        except SLoRAError as error:
            return error

    return returning


async def result_of(call: Awaitable[T | SLoRAError]) -> T:
    """Result of a remote call of a method under `returns_errors`.

    Raises:
        SLoRAError: what the method raised.
        RayError: everything else, the end of the remote process included.
    """
    result = await call
    if isinstance(result, SLoRAError):
        raise result
    return result


def is_cancellation(error: BaseException) -> bool:
    """Whether a call ended because Ray or Serve cancelled it."""
    return isinstance(error, TaskCancelledError)


def is_actor_death(error: BaseException) -> bool:
    """Whether a call met an actor that has ended or does not answer."""
    return isinstance(error, RayActorError)
