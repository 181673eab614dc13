"""How errors cross processes: typed ones as values, all others as Ray has them.

What a remote method raises Ray logs with its traceback, and its caller gets it as a
`RayTaskError`, whose text is that traceback. A typed error is somebody's input and no defect: the
method returns it instead (`returns_errors`), and its caller raises it as itself (`result_of`). A
stream of a replica carries one in its last item (`slora_core.requests.Delta`). What is not typed
stays Ray's own error, and nobody but this module knows how those look.
"""

import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import grpc
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from slora_core.errors import EngineDeadError, SLoRAError

# How the end of a replica shows at a handle. Of gRPC's statuses, Serve itself makes UNAVAILABLE a
# RayActorError in most places; CANCELLED is what a stopping replica's server ends a call with. Any
# other, such as a message over the size limit, would meet the next replica just so.
_REPLICA_ERRORS = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
_REPLICA_STATUSES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

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


def typed_call_error(error: Exception) -> Exception:
    """What a call of a deployment failed with: an EngineDeadError where the replica has ended."""
    is_status = isinstance(error, grpc.aio.AioRpcError) and error.code() in _REPLICA_STATUSES
    if is_status or isinstance(error, _REPLICA_ERRORS):
        return EngineDeadError("the engine replica ended before the request did")
    return error
