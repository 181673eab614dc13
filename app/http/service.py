"""From validated OpenAI requests to answers that are ready to run, and the list of models.

Owns the checks that need the model: which adapter a name means, what the context holds, which
token ids exist. It knows nothing of HTTP; `routes` reads bodies and sends the answers.
"""

import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Protocol

from app.generation.attempts import Renew
from app.generation.text_stream import Generation
from app.http.limits import ModelLimits
from app.http.responses import Answer
from app.http.schemas import ChatCompletionRequest, CompletionRequest, ModelCard, SamplingFields
from app.registry.follower import RegistryView
from app.registry.state import AdapterRecord
from app.routing.conversation import conversation_of_chat, conversation_of_prompt
from slora_core.errors import (
    AdapterUnavailableError,
    InvalidRequestError,
    PromptTooLongError,
)
from slora_core.models.generation_defaults import OPENAI_DEFAULTS, GenerationDefaults
from slora_core.requests import Delta, Request, SamplingParams
from slora_core.text.incremental_decoder import MAX_CONTEXT
from slora_core.text.tokenizer import Tokenizer

# OpenAI's own default of completions.
DEFAULT_COMPLETION_TOKENS = 16


class Engine(Protocol):
    """What the service needs of `generation.client.EngineClient`."""

    def generate(
        self, request: Request, record: AdapterRecord | None, renew: Renew
    ) -> AsyncGenerator[Delta, None]: ...


class CompletionService:
    """Starts answers; holds no state of its own between requests."""

    def __init__(
        self,
        base_model_name: str,
        base_model_root: str,
        limits: ModelLimits,
        tokenizer: Tokenizer,
        registry: RegistryView,
        engine: Engine,
        defaults: GenerationDefaults = OPENAI_DEFAULTS,
        base_model_revision: str | None = None,
    ) -> None:
        self.base_model_name = base_model_name
        self.registry = registry
        self._base_model_root = base_model_root
        self._base_model_revision = base_model_revision
        self._limits = limits
        self._tokenizer = tokenizer
        self._engine = engine
        # Of sampling, where a request is silent.
        self._defaults = defaults
        self._default_sampling = asdict(defaults)
        self._started_at = int(time.time())

    async def complete(self, body: CompletionRequest, deadline: float | None = None) -> Answer:
        """Check and prepare a completion request; nothing runs before the answer is read.

        `deadline` is when it is worth nothing any more, seconds since the epoch.

        Raises:
            InvalidRequestError: a prompt or limit that the model cannot take.
            AdapterNotFoundError: no model has this name.
        """
        record = await self._resolve(body.model)
        self._limits.check_token_ids(body.stop_token_ids, "stop_token_ids")
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        seed = secrets.randbits(62)
        generations = []
        for index, prompt in enumerate(body.prompt):
            if isinstance(prompt, str):
                with _naming("prompt"):
                    prompt_ids = await self._tokenizer.encode_async(
                        prompt, body.add_special_tokens, self._limits.max_prompt_len
                    )
            else:
                prompt_ids = prompt
            self._limits.check_context(len(prompt_ids), "prompt", body.max_tokens, "max_tokens")
            self._limits.check_token_ids(prompt_ids, "prompt")
            max_tokens = body.max_tokens
            if max_tokens is None:
                room = self._output_room(prompt_ids, record)
                max_tokens = min(DEFAULT_COMPLETION_TOKENS, room)
            # Several prompts with one drawn seed would sample alike.
            sampling = self._sampling(body, max_tokens, seed + index, record)
            conversation = conversation_of_prompt(prompt_ids, self._limits.page_tokens)
            request = _request(
                f"{answer_id}-{index}", prompt_ids, sampling, record, deadline, conversation
            )
            generations.append(self._generation(index, request, record))
        return Answer(body, generations, answer_id)

    async def chat(self, body: ChatCompletionRequest, deadline: float | None = None) -> Answer:
        """Check and prepare a chat request; raises as `complete`."""
        record = await self._resolve(body.model)
        self._limits.check_token_ids(body.stop_token_ids, "stop_token_ids")
        messages = [message.as_template_input() for message in body.messages]
        with _naming("messages"):
            prompt_ids = await self._tokenizer.encode_chat(
                messages,
                body.chat_template_kwargs,
                self._limits.max_prompt_len,
                None if record is None else record.text.chat_template,
            )
        limit = body.token_limit
        self._limits.check_context(len(prompt_ids), "messages", limit, body.limit_name)
        if limit is None:
            limit = self._output_room(prompt_ids, record)
        sampling = self._sampling(body, limit, secrets.randbits(62), record)
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        conversation = ""
        if len(prompt_ids) >= self._limits.page_tokens:
            conversation = conversation_of_chat(messages, body.chat_template_kwargs)
        request = _request(answer_id, prompt_ids, sampling, record, deadline, conversation)
        return Answer(body, [self._generation(0, request, record)], answer_id)

    def model_cards(self) -> list[ModelCard]:
        """The base model first, then the adapters by name."""
        base = ModelCard(
            id=self.base_model_name,
            created=self._started_at,
            root=self._base_model_root,
            revision=self._base_model_revision,
            max_model_len=self._limits.context_len,
            eos_token_ids=sorted(self._limits.eos_token_ids),
            default_sampling=self._default_sampling,
        )
        adapters = sorted(self.registry.records.values(), key=lambda record: record.name)
        return [base, *(self.adapter_card(record) for record in adapters)]

    def adapter_card(self, record: AdapterRecord) -> ModelCard:
        return ModelCard(
            id=record.name,
            created=int(record.loaded_at),
            root=record.path,
            parent=self.base_model_name,
            max_model_len=self._limits.context_len,
            eos_token_ids=sorted({*self._limits.eos_token_ids, *self._own_ends(record)}),
            default_sampling=self._default_sampling,
            warnings=_warnings(record),
        )

    async def model_card(self, name: str) -> ModelCard:
        """The card of one model.

        Raises:
            AdapterNotFoundError: no model has this name.
        """
        record = await self._resolve(name)
        return self.model_cards()[0] if record is None else self.adapter_card(record)

    def check_base_name(self, name: str | None) -> None:
        """Raises InvalidRequestError where an adapter is loaded for another base model."""
        served = (self.base_model_name, self._base_model_root)
        if name is not None and name not in served:
            raise InvalidRequestError(
                f"base_model_name is {name!r}; the base model is {served[0]!r} from {served[1]!r}",
                "base_model_name",
            )

    def _sampling(
        self, body: SamplingFields, max_tokens: int, seed: int, record: AdapterRecord | None
    ) -> SamplingParams:
        """A body's settings, with what ends a text beside what the body names.

        The end tokens of an adapter, and special tokens among the stop strings: no text shows them.
        """
        sampling = body.sampling_params(max_tokens, seed, self._defaults)
        ends = [self._tokenizer.special_token_id(stop) for stop in sampling.stop]
        if not sampling.ignore_eos:
            ends += self._own_ends(record)
        # A tokenizer may have tokens that the model has no logits of.
        more = [i for i in ends if i is not None and i < self._limits.vocab_size]
        if not more:
            return sampling
        return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *more))

    def _own_ends(self, record: AdapterRecord | None) -> list[int]:
        """What ends a text of an adapter beside what ends the base model's."""
        if record is None:
            return []
        return [i for i in record.text.eos_token_ids if i < self._limits.vocab_size]

    async def _resolve(self, name: str) -> AdapterRecord | None:
        return None if name == self.base_model_name else await self.registry.find(name)

    def _output_room(self, prompt_ids: list[int], record: AdapterRecord | None) -> int:
        return self._limits.output_room(len(prompt_ids), record, self.registry.num_pool_pages)

    def _generation(self, index: int, request: Request, record: AdapterRecord | None) -> Generation:
        deltas = self._engine.generate(request, record, self._renewed)
        is_end = self._limits.eos_token_ids.__contains__
        decoder = self._tokenizer.decoder([*request.prompt_ids[-MAX_CONTEXT:], *request.output_ids])
        return Generation(index, request, deltas, decoder, is_end)

    async def _renewed(self, record: AdapterRecord, error: Exception) -> AdapterRecord:
        """What an adapter's name means now that the adapter is gone."""
        await self.registry.refresh()
        newer = await self.registry.find(record.name)
        if newer.adapter_id == record.adapter_id:
            # Nobody has loaded it anew.
            if isinstance(error, AdapterUnavailableError):
                raise error
            raise InvalidRequestError(str(error), "model") from error
        return newer


def _warnings(record: AdapterRecord) -> list[str]:
    if record.unavailable is None:
        return list(record.warnings)
    return [*record.warnings, f"its files cannot be used at the moment: {record.unavailable}"]


@contextmanager
def _naming(param: str) -> Iterator[None]:
    """Have a prompt that is too long told as this field."""
    try:
        yield
    except PromptTooLongError as error:
        raise PromptTooLongError(error.max_tokens, param) from error


def _request(
    request_id: str,
    prompt_ids: list[int],
    sampling: SamplingParams,
    record: AdapterRecord | None,
    deadline: float | None,
    conversation: str,
) -> Request:
    """What of a body is no sampling is put into the request here."""
    return Request(
        prompt_ids,
        sampling,
        None if record is None else record.adapter_id,
        request_id=request_id,
        arrived_at=time.time(),
        deadline=deadline,
        conversation=conversation,
    )
