"""From validated OpenAI requests to answers that are ready to run, and the list of models.

Owns the checks that need the model: which adapter a name means, what the context holds, which
token ids exist. It knows nothing of HTTP; `ingress` reads bodies and sends the answers.
"""

import secrets
import time
import uuid
from dataclasses import dataclass

from app.generation.replica_protocol import GenerateRequest
from app.generation.text_stream import Engine, Generation
from app.http.responses import Answer
from app.http.schemas import ChatCompletionRequest, CompletionRequest, ModelCard
from app.registry.follower import RegistryView
from app.registry.registry import AdapterRecord
from slora_core.errors import InvalidRequestError
from slora_core.text.tokenizer import Tokenizer

# OpenAI's own default of completions.
DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class ModelLimits:
    """What the base model allows, and the size of a page."""

    # Largest prompt + output, tokens.
    context_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    page_tokens: int

    def output_room(
        self, num_prompt_tokens: int, record: AdapterRecord | None, num_pool_pages: int | None
    ) -> int:
        """Most output tokens that fit the context and the pool, beside the adapter's pages.

        At least 1: where not even that fits, the engine refuses with its own numbers. None is a
        pool of which nothing is known yet.
        """
        limit = self.context_len
        if num_pool_pages is not None:
            num_adapter_pages = 0 if record is None else record.num_pages
            limit = min(limit, (num_pool_pages - num_adapter_pages) * self.page_tokens)
        return max(1, limit - num_prompt_tokens)


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
    ) -> None:
        self.base_model_name = base_model_name
        self.registry = registry
        self._base_model_root = base_model_root
        self._limits = limits
        self._tokenizer = tokenizer
        self._engine = engine
        self._started_at = int(time.time())

    async def complete(self, request: CompletionRequest) -> Answer:
        """Check and prepare a completion request; nothing runs before the answer is read.

        Raises:
            InvalidRequestError: a prompt or limit that the model cannot take.
            AdapterNotFoundError: no model has this name.
        """
        record = await self._resolve(request.model)
        self._check_token_ids(request.stop_token_ids, "stop_token_ids")
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        seed = secrets.randbits(62)
        generations = []
        for index, prompt in enumerate(request.prompt):
            if isinstance(prompt, str):
                prompt_ids = await self._tokenizer.encode_async(prompt)
            else:
                prompt_ids = prompt
            self._check_context(len(prompt_ids), "prompt", request.max_tokens, "max_tokens")
            self._check_token_ids(prompt_ids, "prompt")
            max_tokens = request.max_tokens
            if max_tokens is None:
                room = self._output_room(prompt_ids, record)
                max_tokens = min(DEFAULT_COMPLETION_TOKENS, room)
            # Several prompts with one drawn seed would sample alike.
            params = request.sampling_params(max_tokens, seed + index)
            generate = GenerateRequest(f"{answer_id}-{index}", prompt_ids, params, record)
            generations.append(self._generation(index, generate))
        return Answer(request, generations, answer_id)

    async def chat(self, request: ChatCompletionRequest) -> Answer:
        """Check and prepare a chat request; raises as `complete`."""
        record = await self._resolve(request.model)
        self._check_token_ids(request.stop_token_ids, "stop_token_ids")
        messages = [message.as_template_input() for message in request.messages]
        prompt_ids = await self._tokenizer.encode_chat(messages)
        limit = request.token_limit
        self._check_context(len(prompt_ids), "messages", limit, request.limit_name)
        if limit is None:
            limit = self._output_room(prompt_ids, record)
        params = request.sampling_params(limit, secrets.randbits(62))
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        generate = GenerateRequest(answer_id, prompt_ids, params, record)
        return Answer(request, [self._generation(0, generate)], answer_id)

    def model_cards(self) -> list[ModelCard]:
        """The base model first, then the adapters by name."""
        base = ModelCard(
            id=self.base_model_name,
            created=self._started_at,
            root=self._base_model_root,
            max_model_len=self._limits.context_len,
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
        )

    async def model_card(self, name: str) -> ModelCard:
        """The card of one model.

        Raises:
            AdapterNotFoundError: no model has this name.
        """
        record = await self._resolve(name)
        return self.model_cards()[0] if record is None else self.adapter_card(record)

    async def _resolve(self, name: str) -> AdapterRecord | None:
        return None if name == self.base_model_name else await self.registry.find(name)

    def _output_room(self, prompt_ids: list[int], record: AdapterRecord | None) -> int:
        return self._limits.output_room(len(prompt_ids), record, self.registry.num_pool_pages)

    def _generation(self, index: int, request: GenerateRequest) -> Generation:
        return Generation(
            index,
            request,
            self._engine,
            self.registry,
            self._tokenizer.decode,
            self._limits.eos_token_ids.__contains__,
        )

    def _check_token_ids(self, token_ids: list[int], param: str) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._limits.vocab_size:
                raise InvalidRequestError(
                    f"{param} has token id {token_id}; the model's are 0 to "
                    f"{self._limits.vocab_size - 1}",
                    param,
                )

    def _check_context(
        self, num_prompt: int, prompt_param: str, max_tokens: int | None, limit_param: str
    ) -> None:
        """Raises InvalidRequestError where prompt and output do not fit the context."""
        context_len = self._limits.context_len
        if num_prompt == 0:
            raise InvalidRequestError("the prompt has no tokens", prompt_param)
        if num_prompt >= context_len:
            raise InvalidRequestError(
                f"the prompt has {num_prompt} tokens; the context of {context_len} tokens must "
                "hold at least one more",
                prompt_param,
            )
        if max_tokens is not None and num_prompt + max_tokens > context_len:
            raise InvalidRequestError(
                f"the prompt has {num_prompt} tokens and {limit_param} is {max_tokens}; together "
                f"they exceed the context of {context_len} tokens",
                limit_param,
            )
