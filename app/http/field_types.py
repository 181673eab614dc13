"""Types of single fields of request bodies: numbers, stop strings, prompts, template arguments.

Owns what a value may look like by itself, beside which fields there are (`schemas`). JSON has one
kind of number, so a float without a fraction is an integer here, and true is none.
"""

import json
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PlainValidator,
    StrictInt,
    StrictStr,
)

MAX_STOP_STRINGS = 16
MAX_PROMPTS = 128
# The engine looks each new token up among them.
MAX_STOP_TOKEN_IDS = 128
# Of chat_template_kwargs, as JSON: a template may go through them often.
MAX_TEMPLATE_KWARGS_BYTES = 4096

# What a template is given by the server, and what transformers takes beside it.
_OWN_TEMPLATE_KWARGS = frozenset(
    (
        *("messages", "conversation", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "tokenizer_kwargs"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "raise_exception", "strftime_now", "self"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"),
        *("mask_token", "additional_special_tokens"),
    )
)


class RequestModel(BaseModel):
    """An object in a body; an unknown field of it is an error."""

    model_config = ConfigDict(extra="forbid")


def as_integer(value: Any) -> Any:
    """A number without a fraction as the integer that it is; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_stop_strings(value: Any) -> Any:
    # An empty one alone is how clients say that no string ends the text.
    if isinstance(value, str):
        return [value] if value else []
    return value


def _as_prompts(value: Any) -> list[str | list[int]]:
    is_single = isinstance(value, str) or bool(_as_token_ids(value))
    prompts = [value] if is_single else value
    if not isinstance(prompts, list):
        raise ValueError("must be a string, a list of strings or lists of token ids")
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise ValueError(f"has {len(prompts)} prompts; it must have 1 to {MAX_PROMPTS}")
    return [_as_prompt(prompt) for prompt in prompts]


def _as_prompt(value: Any) -> str | list[int]:
    prompt = value if isinstance(value, str) else _as_token_ids(value)
    if prompt is None:
        raise ValueError("must be a string, a list of strings or lists of token ids")
    if not prompt:
        raise ValueError("is empty")
    return prompt


def _as_token_ids(value: Any) -> list[int] | None:
    """None for what is no list of token ids."""
    if not isinstance(value, list):
        return None
    # JSON's true is an int to Python.
    if all(type(item) is int for item in value):
        return value
    token_ids = [as_integer(item) for item in value]
    return token_ids if all(type(item) is int for item in token_ids) else None


def _checked_template_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    for name in kwargs:
        if name in _OWN_TEMPLATE_KWARGS:
            raise ValueError(f"may not have {name}, which is the server's to give")
        if not name.isidentifier():
            raise ValueError(f"has {name[:100]!r}, which is no name that a template can use")
    num_bytes = len(json.dumps(kwargs))
    if num_bytes > MAX_TEMPLATE_KWARGS_BYTES:
        raise ValueError(f"has {num_bytes} bytes; it must have {MAX_TEMPLATE_KWARGS_BYTES} at most")
    return kwargs


Integer = Annotated[StrictInt, BeforeValidator(as_integer)]
TokenLimit = Annotated[Integer, Field(ge=1)]
StrictFloat = Annotated[FiniteFloat, Field(strict=True)]
Seconds = Annotated[FiniteFloat, Field(strict=True, gt=0.0)]
StopStrings = Annotated[
    list[Annotated[StrictStr, Field(min_length=1)]],
    Field(max_length=MAX_STOP_STRINGS),
    BeforeValidator(_as_stop_strings),
]
StopTokenIds = Annotated[list[Integer], Field(max_length=MAX_STOP_TOKEN_IDS)]
# One or several prompts, each a text or token ids.
Prompts = Annotated[list[str | list[int]], PlainValidator(_as_prompts)]
TemplateKwargs = Annotated[dict[str, Any], AfterValidator(_checked_template_kwargs)]
