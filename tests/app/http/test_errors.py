import json
import logging

import pytest
from ray.exceptions import ActorDiedError
from starlette.exceptions import HTTPException

from app.http.errors import BodyTooLargeError, api_error
from slora_core import errors


@pytest.mark.parametrize(
    ("error", "status", "kind", "param"),
    [
        (errors.InvalidRequestError("x", "top_p"), 400, "BadRequestError", "top_p"),
        (errors.InvalidRequestError("x"), 400, "BadRequestError", None),
        (errors.InvalidAdapterError("x"), 400, "BadRequestError", "lora_path"),
        (errors.AdapterTooLargeError("x"), 400, "BadRequestError", "lora_path"),
        (errors.AdapterNameError("x"), 400, "BadRequestError", "lora_name"),
        (errors.AdapterExistsError("x"), 400, "BadRequestError", "lora_name"),
        (errors.AdapterPathError("x"), 403, "PermissionDeniedError", "lora_path"),
        (errors.AdapterNotFoundError("x"), 404, "NotFoundError", "model"),
        (errors.StoreFullError("x"), 503, "ServiceUnavailableError", None),
        (errors.StoreGoneError("x"), 503, "ServiceUnavailableError", None),
        (errors.EngineDeadError("x"), 503, "ServiceUnavailableError", None),
        (errors.OverloadedError("x"), 503, "ServiceUnavailableError", None),
        (errors.RequestTimeoutError("x"), 504, "TimeoutError", "timeout"),
        (BodyTooLargeError("x"), 413, "RequestTooLargeError", None),
        (HTTPException(405, "x"), 405, "MethodNotAllowedError", None),
        (HTTPException(418, "x"), 418, "I'maTeapot", None),
    ],
)
def test_status_and_body(error, status, kind, param):
    response = api_error(error).response()
    assert response.status_code == status
    assert json.loads(response.body) == {
        "error": {"message": "x", "type": kind, "param": param, "code": status}
    }
    assert ("retry-after" in response.headers) == (status == 503)


def test_a_dead_actor_is_no_defect():
    told = api_error(ActorDiedError())
    assert told.status == 503
    assert "try again" in told.message


def test_a_defect_is_logged_but_not_told(caplog):
    with caplog.at_level(logging.ERROR):
        told = api_error(KeyError("secret"), "cmpl-1")
    assert told.status == 500
    assert "secret" not in told.message and "cmpl-1" in told.message
    assert "secret" in caplog.text and "cmpl-1" in caplog.text
