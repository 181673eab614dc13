"""Request and response bodies of the OpenAI API, and what of a request is supported.

Owns which fields there are and how they depend on each other; what a single one may look like is in
`field_types`, which further ones change nothing in `neutral_fields`. It knows neither the model nor
the adapters; limits that depend on them are in `limits`.
"""

from typing import Literal, Self, TypeVar

from pydantic import BaseModel, Field, StrictBool, StrictStr, model_validator

from app.http.chat_messages import MAX_MESSAGES, ChatMessage
from app.http.field_types import (
    Integer,
    Prompts,
    RequestModel,
    Seconds,
    StopStrings,
    StopTokenIds,
    StrictFloat,
    TemplateKwargs,
    TokenLimit,
)
from slora_core.models.generation_defaults import OPENAI_DEFAULTS, GenerationDefaults
from slora_core.requests import SamplingParams

Number = TypeVar("Number", int, float)


class StreamOptions(RequestModel):
    # An event more at the end, with the usage.
    include_usage: StrictBool = False
    # The usage so far in every event.
    continuous_usage_stats: StrictBool = False


class SamplingFields(RequestModel):
    """Fields that completions and chats share; None is an absent one."""

    model: StrictStr
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    temperature: StrictFloat | None = None
    top_p: StrictFloat | None = None
    seed: Integer | None = None
    stop: StopStrings = []
    # Beyond OpenAI's own.
    top_k: Integer | None = None
    min_p: StrictFloat | None = None
    min_tokens: Integer = 0
    ignore_eos: StrictBool = False
    stop_token_ids: StopTokenIds = []
    # Seconds after which the answer is worth nothing any more; see `deadline`.
    timeout: Seconds | None = None

    @model_validator(mode="after")
    def _options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed only with stream set to true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling_params(
        self, max_tokens: int, seed: int, defaults: GenerationDefaults = OPENAI_DEFAULTS
    ) -> SamplingParams:
        """As the engine takes them; `seed` and `defaults` are used where the request is silent.

        Raises:
            InvalidRequestError: a value outside its range.
        """
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_or(self.temperature, defaults.temperature),
            top_p=_or(self.top_p, defaults.top_p),
            # -1 is how other servers say "all".
            top_k=0 if self.top_k == -1 else _or(self.top_k, defaults.top_k),
            min_p=_or(self.min_p, defaults.min_p),
            seed=seed if self.seed is None else self.seed,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=tuple(self.stop_token_ids),
            stop=tuple(self.stop),
        )


class CompletionRequest(SamplingFields):
    prompt: Prompts
    # None: 16, or what the context leaves if that is less.
    max_tokens: TokenLimit | None = None
    # Whether a text begins as the tokenizer begins one, most often with a token of its own.
    add_special_tokens: StrictBool = True


class ChatCompletionRequest(SamplingFields):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    # None: whatever the context leaves.
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    # What the chat template sees beside the messages.
    chat_template_kwargs: TemplateKwargs = {}

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
    # Checked, where it is given.
    base_model_name: StrictStr | None = None


class UnloadAdapterRequest(RequestModel):
    lora_name: StrictStr


class PromptTokensDetails(BaseModel):
    # Found in the prefix cache rather than computed.
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


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
    # Commit of a base model from the hub.
    revision: str | None = None
    # The base model of an adapter.
    parent: str | None = None
    max_model_len: int | None = None
    # Tokens that end a text unless a request ignores them.
    eos_token_ids: list[int] = []
    # Settings of sampling where a request is silent.
    default_sampling: dict[str, float] = {}
    # What to know of an adapter that is served all the same.
    warnings: list[str] = []


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value
