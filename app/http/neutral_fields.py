"""Fields of other servers' clients that are not supported, and the values at which they may stand.

A field that is accepted is obeyed; one of these is accepted only where it changes nothing, and
refused by its name otherwise. They are OpenAI's and those of vLLM's request schema. `parsing` drops
them before a body is validated.
"""

import json
from collections.abc import Callable
from typing import Any

from app.http.field_types import RequestModel, as_integer
from app.http.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
from slora_core.errors import InvalidRequestError

IsNeutral = Callable[[Any], bool]


def _only(*values: Any) -> IsNeutral:
    # JSON's true is not 1.
    return lambda given: any(
        given == value and isinstance(given, bool) == isinstance(value, bool) for value in values
    )


def _is_string(given: Any) -> bool:
    return isinstance(given, str)


def _is_object(given: Any) -> bool:
    return isinstance(given, dict)


def _is_integer(given: Any) -> bool:
    return type(as_integer(given)) is int


# null stands for an absent field everywhere.
_null = _only()

_OPENAI: dict[str, IsNeutral] = {
    "n": _only(1),
    "presence_penalty": _only(0),
    "frequency_penalty": _only(0),
    "logit_bias": _only({}),
    # Labels for the provider's own use.
    "user": _is_string,
    "safety_identifier": _is_string,
    "prompt_cache_key": _is_string,
    "metadata": _is_object,
    "service_tier": _only("auto", "default"),
}
_VLLM: dict[str, IsNeutral] = {
    # How a token is chosen.
    "repetition_penalty": _only(1),
    "repetition_detection": _null,
    "allowed_token_ids": _null,
    "bad_words": _only([]),
    "logits_processors": _only([]),
    "thinking_token_budget": _only(-1),
    # Beam search, and how it would rank beams.
    "use_beam_search": _only(False),
    "best_of": _only(1),
    "length_penalty": _only(1),
    "early_stopping": _only(False),
    # The grammar of an answer.
    "response_format": _only({"type": "text"}),
    "structured_outputs": _null,
    "guided_json": _null,
    "guided_regex": _null,
    "guided_choice": _null,
    "guided_grammar": _null,
    "guided_decoding_backend": _null,
    "guided_whitespace_pattern": _null,
    # How it becomes text.
    "detokenize": _only(True),
    "skip_special_tokens": _only(True),
    # Between tokens that are skipped.
    "spaces_between_special_tokens": _only(True, False),
    "include_stop_str_in_output": _only(False),
    "echo": _only(False),
    # What of a prompt is cut, and from which side.
    "truncate_prompt_tokens": _null,
    "truncation_side": _only("left", "right"),
    # What an answer tells beside its text.
    "prompt_logprobs": _null,
    "logprob_token_ids": _null,
    "return_tokens_as_token_ids": _only(False),
    "return_token_ids": _only(False),
    "return_token_offsets": _only(False),
    "return_prompt_text": _only(False),
    # How it runs.
    "request_id": _null,
    "priority": _only(0),
    "cache_salt": _null,
    "kv_transfer_params": _only({}),
    "ec_transfer_params": _only({}),
    "vllm_xargs": _only({}),
}
_COMPLETION: dict[str, IsNeutral] = {
    **_OPENAI,
    **_VLLM,
    "suffix": _only(""),
    "logprobs": _null,
    "prompt_embeds": _null,
}
_CHAT: dict[str, IsNeutral] = {
    **_OPENAI,
    **_VLLM,
    "logprobs": _only(False),
    "top_logprobs": _only(0),
    "tools": _only([]),
    "functions": _only([]),
    "tool_choice": _only("none", "auto"),
    "function_call": _only("none", "auto"),
    "parallel_tool_calls": _only(True, False),
    "modalities": _only(["text"]),
    "store": _only(False),
    "audio": _null,
    "prediction": _null,
    "reasoning_effort": _null,
    "verbosity": _null,
    "web_search_options": _null,
    # vLLM's.
    "add_generation_prompt": _only(True),
    "continue_final_message": _only(False),
    "add_special_tokens": _only(False),
    "chat_template": _null,
    "documents": _only([]),
    "media_io_kwargs": _only({}),
    "mm_processor_kwargs": _only({}),
    "include_reasoning": _only(True),
    "return_assistant_tokens_mask": _only(False),
}
# What a client sends back when it repeats an assistant message it was given.
NEUTRAL_OF_MESSAGE: dict[str, IsNeutral] = {
    "refusal": _null,
    "audio": _null,
    "function_call": _null,
    "tool_calls": _only([]),
    "annotations": _only([]),
    "reasoning": _only(""),
    "reasoning_content": _only(""),
}
NEUTRAL_OF_STREAM_OPTIONS: dict[str, IsNeutral] = {"include_obfuscation": _only(False)}
_LOAD: dict[str, IsNeutral] = {
    # A number that other servers count adapters by.
    "lora_int_id": _is_integer,
    # Weights of experts, stacked.
    "is_3d_lora_weight": _only(False),
    # SGLang's: whether the adapter stays on the device for ever.
    "pinned": _only(False),
}
_NEUTRAL: dict[type[RequestModel], dict[str, IsNeutral]] = {
    CompletionRequest: _COMPLETION,
    ChatCompletionRequest: _CHAT,
    LoadAdapterRequest: _LOAD,
    UnloadAdapterRequest: {"lora_int_id": _is_integer},
}


def neutral_fields(model: type[RequestModel]) -> dict[str, IsNeutral]:
    """By name, at which values a field of such a body changes nothing."""
    return _NEUTRAL.get(model, {})


def drop_neutral(
    fields: dict[str, Any], neutral: dict[str, IsNeutral], prefix: str = ""
) -> dict[str, Any]:
    """The fields without null ones and without those of `neutral`.

    Raises:
        InvalidRequestError: one of `neutral` has another value; `param` is `prefix` and its name.
    """
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
