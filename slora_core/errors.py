"""Errors a user of the engine can reach, each saying the value and what was allowed.

They know nothing of HTTP: `app.http.errors` maps them to statuses by class.
"""


class SLoRAError(Exception):
    """Base of every error that is somebody's input, not a defect."""


class InvalidRequestError(SLoRAError):
    """A generation request that cannot be served as asked; `param` names the offending field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (str(self), self.param)


class PromptTooLongError(InvalidRequestError):
    """A text that was not encoded to its end, since it has more than `max_tokens` tokens."""

    def __init__(self, max_tokens: int, param: str | None = None) -> None:
        super().__init__(
            f"the prompt has more than {max_tokens} tokens, which is what the context holds beside "
            "one more",
            param,
        )
        self.max_tokens = max_tokens

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.max_tokens, self.param)


class InvalidAdapterError(SLoRAError):
    """An adapter whose files are unsupported, damaged or do not fit the base model."""


class AdapterNameError(SLoRAError):
    """A name that no adapter can have: its syntax, or the base model's own."""


class AdapterTooLargeError(InvalidAdapterError):
    """An adapter that needs more pages than the unified pool has."""


class AdapterNotFoundError(SLoRAError):
    """No adapter is registered under this name or content hash."""


class AdapterExistsError(SLoRAError):
    """The adapter name is taken and the caller did not ask to replace it."""


class AdapterPathError(SLoRAError):
    """An adapter path outside the allowed roots."""


class UnsupportedPathError(InvalidAdapterError):
    """An adapter path that names something other than a directory, such as an address."""


class AdapterChangingError(InvalidAdapterError):
    """Files that somebody is writing while they are read; trying again helps."""


class AdapterUnreadableError(InvalidAdapterError):
    """Files that the system did not give at the moment; trying again may help."""


class AdapterUnavailableError(SLoRAError):
    """A registered adapter whose bytes nothing has any more: no files, no packed copy."""


class StoreFullError(SLoRAError):
    """The host store has no room for an adapter beside those under a lease, or none at all."""


class StoreGoneError(SLoRAError):
    """The adapter store, or the one that gave a location, has ended; it is made anew in seconds.

    Or its memory cannot be mapped at the moment: either way a new lease is needed.
    """


class UnsupportedModelError(SLoRAError):
    """A base model whose architecture or options the engine does not implement."""


class OverloadedError(SLoRAError):
    """As much waits as may; `retry_after_s` is when there will be room, where that is known."""

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (str(self), self.retry_after_s)


class RequestTimeoutError(SLoRAError):
    """A request whose own deadline passed before its answer was complete."""


class ServerStoppingError(SLoRAError):
    """The server is being stopped, and ends what runs."""


class EngineFaultError(SLoRAError):
    """An engine, or several, failed at this request alone; trying again would not help."""


class EngineDeadError(SLoRAError):
    """The engine process ended, that of `replica_id`; every request it held has failed.

    `is_suspect`: the engine ended by itself while it computed this request, which may be why. What
    somebody kills, be it the engine, its replica or their node, makes no request a suspect.
    """

    def __init__(
        self, message: str, replica_id: str | None = None, is_suspect: bool = False
    ) -> None:
        super().__init__(message)
        self.replica_id = replica_id
        self.is_suspect = is_suspect

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (str(self), self.replica_id, self.is_suspect)
