"""A chat as the text that a model was trained on, by the template in its tokenizer's files."""

from collections.abc import Mapping, Sequence
from typing import Any

from slora_core.errors import InvalidRequestError


class ChatTemplate:
    """`hf_tokenizer` is a tokenizer of transformers, which runs the template in a sandbox."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf_tokenizer = hf_tokenizer

    def render(
        self, messages: Sequence[dict[str, Any]], kwargs: Mapping[str, Any] | None = None
    ) -> str:
        """The chat with the template's own special tokens, the model's answer about to begin.

        `kwargs` are what the template sees beside the messages.

        Raises:
            InvalidRequestError: there is no template, it refuses the messages or fails on them.
        """
        from jinja2 import TemplateError

        if self._hf_tokenizer.chat_template is None:
            raise InvalidRequestError(
                "the model has no chat template; use /v1/completions", "messages"
            )
        try:
            return self._hf_tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **(kwargs or {})
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            # A template raises on roles and orders it does not know, in any of these ways.
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error
