"""From the bytes of a request body to a validated model, or an error that names the field.

It knows JSON and pydantic's errors; which fields there are is for `schemas` and `neutral_fields` to
say.
"""

import json
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from app.http.chat_messages import MAX_MESSAGES
from app.http.field_types import RequestModel
from app.http.neutral_fields import (
    NEUTRAL_OF_MESSAGE,
    NEUTRAL_OF_STREAM_OPTIONS,
    drop_neutral,
    neutral_fields,
)
from slora_core.errors import InvalidRequestError

# Fields of any object in a body. Pydantic notes an error for each that is unknown, which takes a
# second and more where a body is full of them.
MAX_FIELDS = 1024

Model = TypeVar("Model", bound=RequestModel)


def parse_body(model: type[Model], body: bytes) -> Model:
    """Validate a request body.

    Raises:
        InvalidRequestError: no JSON object, an unknown or unsupported field, a wrong value.
    """
    fields = drop_neutral(_parse_json(body), neutral_fields(model))
    if "messages" in fields:
        fields["messages"] = _drop_neutral_of_messages(fields["messages"])
    if isinstance(fields.get("stream_options"), dict):
        fields["stream_options"] = drop_neutral(
            fields["stream_options"], NEUTRAL_OF_STREAM_OPTIONS, "stream_options."
        )
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _invalid_request(error) from error


def _parse_json(body: bytes) -> dict[str, Any]:
    try:
        # Not json.loads(body), which takes UTF-16 and halves of surrogate pairs too.
        text = body.decode("utf-8-sig")
        fields = json.loads(text, parse_constant=_refuse_constant, object_hook=_refuse_wide)
        # An escaped half of a surrogate pair parses, but no tokenizer takes it.
        if rb"\ud" in body.lower():
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return fields


def _refuse_wide(fields: dict[str, Any]) -> dict[str, Any]:
    if len(fields) > MAX_FIELDS:
        raise InvalidRequestError(f"an object has {len(fields)} fields, more than {MAX_FIELDS}")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _drop_neutral_of_messages(messages: Any) -> Any:
    if not isinstance(messages, list) or len(messages) > MAX_MESSAGES:
        # The model says what is wrong.
        return messages
    return [
        drop_neutral(message, NEUTRAL_OF_MESSAGE, f"messages[{index}].")
        if isinstance(message, dict)
        else message
        for index, message in enumerate(messages)
    ]


def _invalid_request(error: ValidationError) -> InvalidRequestError:
    """The first problem, told with the field's path; `param` is the top-level field."""
    first = error.errors(include_url=False)[0]
    path = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
    ).removeprefix(".")
    param = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        return InvalidRequestError(f"unknown field {path}", param)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return InvalidRequestError(f"{path} is missing", param)
    if isinstance(first["input"], bool | int | float | str):
        message += f", given {json.dumps(first['input'], ensure_ascii=False)[:100]}"
    return InvalidRequestError(f"{path}: {message}" if path else message, param)
