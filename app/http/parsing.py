"""From the bytes of a request body to a validated model, or an error that names the field.

Owns the list of OpenAI parameters that are not supported, and at which values they change nothing
and may stand. A parameter that is accepted is obeyed.
"""

import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from app.http.schemas import (
    MAX_MESSAGES,
    ChatCompletionRequest,
    CompletionRequest,
    LoadAdapterRequest,
    RequestModel,
    UnloadAdapterRequest,
)
from slora_core.errors import InvalidRequestError

# Fields of any object in a body. Pydantic notes an error for each that is unknown, which takes a
# second and more where a body is full of them.
MAX_FIELDS = 1024

Model = TypeVar("Model", bound=RequestModel)
IsNeutral = Callable[[Any], bool]


def _only(*values: Any) -> IsNeutral:
    # JSON's true is not 1.
    return lambda given: any(
        given == value and isinstance(given, bool) == isinstance(value, bool) for value in values
    )


def _is_string(given: Any) -> bool:
    return isinstance(given, str)


# Values that change nothing; null stands for an absent parameter everywhere.
_NEUTRAL_SAMPLING: dict[str, IsNeutral] = {
    "n": _only(1),
    "presence_penalty": _only(0),
    "frequency_penalty": _only(0),
    "repetition_penalty": _only(1),
    "logit_bias": _only({}),
    # Labels for the provider's own use.
    "user": _is_string,
    "safety_identifier": _is_string,
    "prompt_cache_key": _is_string,
    "metadata": lambda given: isinstance(given, dict),
    "service_tier": _only("auto", "default"),
}
_NEUTRAL_COMPLETION: dict[str, IsNeutral] = {
    **_NEUTRAL_SAMPLING,
    "best_of": _only(1),
    "echo": _only(False),
    "suffix": _only(""),
    "logprobs": _only(),
}
_NEUTRAL_CHAT: dict[str, IsNeutral] = {
    **_NEUTRAL_SAMPLING,
    "logprobs": _only(False),
    "top_logprobs": _only(0),
    "tools": _only([]),
    "functions": _only([]),
    "tool_choice": _only("none", "auto"),
    "function_call": _only("none", "auto"),
    "parallel_tool_calls": _only(True, False),
    "response_format": _only({"type": "text"}),
    "modalities": _only(["text"]),
    "store": _only(False),
    "audio": _only(),
    "prediction": _only(),
    "reasoning_effort": _only(),
    "verbosity": _only(),
    "web_search_options": _only(),
}
# What a client sends back when it repeats an assistant message it was given.
_NEUTRAL_MESSAGE: dict[str, IsNeutral] = {
    "name": _only(),
    "refusal": _only(),
    "audio": _only(),
    "function_call": _only(),
    "tool_calls": _only([]),
    "annotations": _only([]),
}
_NEUTRAL: dict[type[RequestModel], dict[str, IsNeutral]] = {
    CompletionRequest: _NEUTRAL_COMPLETION,
    ChatCompletionRequest: _NEUTRAL_CHAT,
    LoadAdapterRequest: {},
    UnloadAdapterRequest: {"lora_int_id": _only()},
}


def parse_body(model: type[Model], body: bytes) -> Model:
    """Validate a request body.

    Raises:
        InvalidRequestError: no JSON object, an unknown or unsupported field, a wrong value.
    """
    fields = _drop_neutral(_parse_json(body), _NEUTRAL.get(model, {}))
    if "messages" in fields:
        fields["messages"] = _drop_neutral_of_messages(fields["messages"])
    if isinstance(fields.get("stream_options"), dict):
        neutral = {"include_obfuscation": _only(False)}
        fields["stream_options"] = _drop_neutral(
            fields["stream_options"], neutral, "stream_options."
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


def _drop_neutral(
    fields: dict[str, Any], neutral: dict[str, IsNeutral], prefix: str = ""
) -> dict[str, Any]:
    kept = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name not in neutral:
            kept[name] = value
        elif not neutral[name](value):
            shown = json.dumps(value, ensure_ascii=False)[:100]
            raise InvalidRequestError(f"{prefix}{name}={shown} is not supported", prefix + name)
    return kept


def _drop_neutral_of_messages(messages: Any) -> Any:
    if not isinstance(messages, list) or len(messages) > MAX_MESSAGES:
        # The model says what is wrong.
        return messages
    return [
        _drop_neutral(message, _NEUTRAL_MESSAGE, f"messages[{index}].")
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
