"""Typed errors as they come back from another process.

Ray raises what a remote method raised as a `RayTaskError` whose text is a whole traceback and
whose `cause` is the error itself. Nobody but this module looks for it there.
"""

from collections.abc import Awaitable
from typing import TypeVar

from ray.exceptions import RayTaskError

from slora_core.errors import SLoRAError

T = TypeVar("T")


def unwrap(error: BaseException) -> SLoRAError | None:
    """The typed error that a remote method raised, None if it was none of ours."""
    # An error that passed through two processes is wrapped twice.
    while isinstance(error, RayTaskError):
        error = error.cause
    return error if isinstance(error, SLoRAError) else None


async def typed(call: Awaitable[T]) -> T:
    """Result of a remote call; a typed error raised there is raised here as itself.

    Raises:
        SLoRAError: what the remote method raised.
        RayError: everything else, the end of the remote process included.
    """
    try:
        return await call
    except RayTaskError as error:
        cause = unwrap(error)
        if cause is None:
            raise
        raise cause from None
