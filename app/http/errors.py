"""Typed errors to HTTP statuses and OpenAI's error body.

Owns the status of each error. It knows no requests; the ingress calls it for every error that a
request meets, and one that it does not know is logged in full and answered without its text.
"""

import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from app.remote_errors import is_actor_death
from slora_core.errors import (
    AdapterChangingError,
    AdapterExistsError,
    AdapterNameError,
    AdapterNotFoundError,
    AdapterPathError,
    AdapterUnavailableError,
    AdapterUnreadableError,
    EngineDeadError,
    EngineFaultError,
    InvalidAdapterError,
    InvalidRequestError,
    OverloadedError,
    RequestTimeoutError,
    ServerStoppingError,
    SLoRAError,
    StoreFullError,
    StoreGoneError,
)

logger = logging.getLogger(__name__)

# Seconds after which a client may try again: about what a replacement engine takes to start.
RETRY_AFTER_S = 5

TYPE_OF_STATUS = {
    400: "BadRequestError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}


class BodyTooLargeError(SLoRAError):
    """A request body beyond the limit."""


class BodyTimeoutError(SLoRAError):
    """A request body that did not come in time."""


class ForeignRequestError(SLoRAError):
    """A request that changes the server, from a page of another site."""


class ContentTypeError(SLoRAError):
    """A body that does not say that it is JSON, where it must."""


# Class to (status, param); the first that matches counts.
STATUS_OF_ERROR: tuple[tuple[type[Exception], int, str | None], ...] = (
    (InvalidRequestError, 400, None),
    (BodyTooLargeError, 413, None),
    (BodyTimeoutError, 408, None),
    (ForeignRequestError, 403, None),
    (ContentTypeError, 415, None),
    (AdapterChangingError, 503, "lora_path"),
    (AdapterUnreadableError, 503, "lora_path"),
    (InvalidAdapterError, 400, "lora_path"),
    (AdapterNameError, 400, "lora_name"),
    (AdapterExistsError, 400, "lora_name"),
    (AdapterPathError, 403, "lora_path"),
    (AdapterNotFoundError, 404, "model"),
    (AdapterUnavailableError, 503, "model"),
    (StoreFullError, 503, None),
    (StoreGoneError, 503, None),
    (OverloadedError, 503, None),
    (ServerStoppingError, 503, None),
    (EngineDeadError, 503, None),
    (EngineFaultError, 500, None),
    (RequestTimeoutError, 504, "timeout"),
)


@dataclass(frozen=True)
class ApiError:
    """What a client is told of an error."""

    status: int
    message: str
    param: str | None = None
    # Seconds, where it is known when a retry may succeed.
    retry_after_s: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's form; an event of a stream carries it too."""
        name = TYPE_OF_STATUS.get(self.status) or HTTPStatus(self.status).phrase.replace(" ", "")
        error = {
            "message": self.message,
            "type": name,
            "param": self.param,
            "code": self.status,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        headers = None
        if self.status == 503:
            headers = {"Retry-After": str(self.retry_after_s or RETRY_AFTER_S)}
        return JSONResponse(self.body, self.status, headers)


def api_error(error: Exception, request_id: str = "") -> ApiError:
    """What the client of this request is told; a defect is logged with its traceback."""
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail)
    if is_actor_death(error):
        logger.warning("request %s met an actor that ended: %r", request_id, error)
        return ApiError(503, "a part of the server is being replaced; try again")
    for error_type, status, param in STATUS_OF_ERROR:
        if isinstance(error, error_type):
            return ApiError(
                status,
                str(error),
                getattr(error, "param", None) or param,
                getattr(error, "retry_after_s", None),
            )
    logger.error("request %s failed", request_id, exc_info=error)
    reference = f"; the server's log has it under request {request_id}" if request_id else ""
    return ApiError(500, f"internal error{reference}")
