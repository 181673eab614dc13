"""Request and response bodies of the OpenAI API, and what of a request is supported.

Owns validation of single fields: types, ranges, unknown names. It knows neither the model nor the
adapters; limits that depend on them are in `limits`.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from slora_core.requests import SamplingParams

MAX_STOP_STRINGS = 16
MAX_PROMPTS = 128
# Messages of a chat, and parts of one: each costs the ingress microseconds before it is a token.
MAX_MESSAGES = 2048
# The engine looks each new token up among them.
MAX_STOP_TOKEN_IDS = 128

Number = TypeVar("Number", int, float)
StopString = Annotated[StrictStr, Field(min_length=1)]
TokenLimit = Annotated[StrictInt, Field(ge=1)]
StrictFloat = Annotated[FiniteFloat, Field(strict=True)]


class RequestModel(BaseModel):
    """A body in which an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(RequestModel):
    include_usage: StrictBool = False


class SamplingFields(RequestModel):
    """Fields that completions and chats share; None is an absent one."""

    model: StrictStr
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    temperature: StrictFloat | None = None
    top_p: StrictFloat | None = None
    seed: StrictInt | None = None
    stop: list[StopString] = Field(default=[], max_length=MAX_STOP_STRINGS)
    # Beyond OpenAI's own.
    top_k: StrictInt | None = None
    min_p: StrictFloat | None = None
    ignore_eos: StrictBool = False
    stop_token_ids: list[StrictInt] = Field(default=[], max_length=MAX_STOP_TOKEN_IDS)

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only with stream set to true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self, max_tokens: int, seed: int) -> SamplingParams:
        """As the engine takes them; `seed` is used where the request has none.

        Where it is silent, the defaults are OpenAI's.

        Raises:
            InvalidRequestError: a value outside its range.
        """
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            # -1 is how other servers say "all".
            top_k=0 if self.top_k == -1 else _or(self.top_k, 0),
            min_p=_or(self.min_p, 0.0),
            seed=seed if self.seed is None else self.seed,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids),
            stop=tuple(self.stop),
        )


class CompletionRequest(SamplingFields):
    # One or several prompts, each a text or token ids.
    prompt: list[str | list[int]]
    # None: 16, or what the context leaves if that is less.
    max_tokens: TokenLimit | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, value: Any) -> list[str | list[int]]:
        is_single = isinstance(value, str) or (value != [] and _is_token_ids(value))
        prompts = [value] if is_single else value
        if not isinstance(prompts, list):
            raise ValueError("must be a string, a list of strings or lists of token ids")
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise ValueError(f"has {len(prompts)} prompts; it must have 1 to {MAX_PROMPTS}")
        for prompt in prompts:
            _check_prompt(prompt)
        return prompts


class TextPart(RequestModel):
    type: Literal["text"]
    text: StrictStr


class ChatMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant"]
    # A text is a list of one part.
    content: list[TextPart] = Field(max_length=MAX_MESSAGES, fail_fast=True)

    @field_validator("content", mode="before")
    @classmethod
    def _content_as_parts(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"type": "text", "text": value}]
        if not isinstance(value, list):
            raise ValueError("must be a string or a list of text parts")
        return value

    def as_template_input(self) -> dict[str, str]:
        """Role and plain text; `developer` is OpenAI's newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatCompletionRequest(SamplingFields):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    # None: whatever the context leaves.
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def limit_name(self) -> str:
        """Which of its two names the limit was given under."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class LoadAdapterRequest(RequestModel):
    # Which names there are, the registry says.
    lora_name: StrictStr
    lora_path: StrictStr = Field(min_length=1)
    # Replace the adapter that has this name.
    load_inplace: StrictBool = False


class UnloadAdapterRequest(RequestModel):
    lora_name: StrictStr


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: None = None
    finish_reason: str | None


class Completion(BaseModel):
    """Answer to a completion request, and each event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: str | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(BaseModel):
    index: int
    # role and content in the first event, content in the others, nothing in the last.
    delta: dict[str, str]
    logprobs: None = None
    finish_reason: str | None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "slora"
    # Where the weights come from.
    root: str
    # The base model of an adapter.
    parent: str | None = None
    max_model_len: int | None = None
    # What to know of an adapter that is served all the same.
    warnings: list[str] = []


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, str) and not _is_token_ids(prompt):
        raise ValueError("must be a string, a list of strings or lists of token ids")
    if not prompt:
        raise ValueError("is empty")


def _is_token_ids(value: Any) -> bool:
    # JSON's true is an int to Python.
    return isinstance(value, list) and all(type(item) is int for item in value)
