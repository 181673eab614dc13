"""Whether a model can take a request; whether the pool can is the scheduler's to say."""

from collections.abc import Sequence

from slora_core.errors import InvalidRequestError
from slora_core.requests import Request


def check_request(request: Request, vocab_size: int, context_len: int) -> None:
    """Whether a model can take a request.

    Raises:
        InvalidRequestError: an empty prompt, a token outside the vocabulary, nothing left to
            generate, or more tokens than the context holds.
    """
    if not request.prompt_ids:
        raise InvalidRequestError("the prompt is empty; it must have at least one token", "prompt")
    _check_token_ids(request.prompt_ids, vocab_size, "the prompt")
    max_tokens = request.sampling.max_tokens
    if request.output_ids:
        _check_token_ids(request.output_ids, vocab_size, "the answer so far")
        if len(request.output_ids) >= max_tokens:
            raise InvalidRequestError(
                f"the answer so far has {len(request.output_ids)} tokens and max_tokens is "
                f"{max_tokens}: nothing is left to generate",
                "max_tokens",
            )
    if len(request.prompt_ids) + max_tokens > context_len:
        raise InvalidRequestError(
            f"the prompt's {len(request.prompt_ids)} tokens and max_tokens {max_tokens} exceed "
            f"the context of {context_len} tokens",
            "max_tokens",
        )


def _check_token_ids(token_ids: Sequence[int], vocab_size: int, where: str) -> None:
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{where} has token id {token_id}; ids are in [0, {vocab_size})", "prompt"
            )
