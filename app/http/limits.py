"""What the base model allows of a request: context, vocabulary, and room in the pool."""

from dataclasses import dataclass

from app.registry.state import AdapterRecord
from slora_core.errors import InvalidRequestError


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

    @property
    def max_prompt_len(self) -> int:
        """Tokens of the longest prompt that leaves room for one more."""
        return self.context_len - 1

    def check_token_ids(self, token_ids: list[int], param: str) -> None:
        """Raises InvalidRequestError for one that the model does not have, under `param`."""
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequestError(
                    f"{param} has token id {token_id}; the model's are 0 to {self.vocab_size - 1}",
                    param,
                )

    def check_context(
        self, num_prompt: int, prompt_param: str, max_tokens: int | None, limit_param: str
    ) -> None:
        """Raises InvalidRequestError where prompt and output do not fit the context."""
        context_len = self.context_len
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
