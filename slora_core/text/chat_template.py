"""A chat as the text that a model was trained on, by the template in its files or an adapter's."""

from collections.abc import Mapping, Sequence
from typing import Any

from slora_core.errors import InvalidRequestError


class ChatTemplate:
    """`hf_tokenizer` is a tokenizer of transformers, which runs templates in a sandbox.

    `source` is the base model's, None that of its files.
    """

    def __init__(self, hf_tokenizer: Any, source: str | None = None) -> None:
        self._hf_tokenizer = hf_tokenizer
        self._source = source

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        kwargs: Mapping[str, Any] | None = None,
        source: str | None = None,
    ) -> str:
        """The chat with the template's own special tokens, the model's answer about to begin.

        `kwargs` are what the template sees beside the messages; `source` is an adapter's template.

        Raises:
            InvalidRequestError: there is no template, it refuses the messages or fails on them.
        """
        from jinja2 import TemplateError

        source = source or self._source
        if source is None and self._hf_tokenizer.chat_template is None:
            raise InvalidRequestError(
                "the model has no chat template; use /v1/completions, or give the server one by "
                "its argument chat_template",
                "messages",
            )
        try:
            return self._hf_tokenizer.apply_chat_template(
                list(messages),
                chat_template=source,
                tokenize=False,
                add_generation_prompt=True,
                **(kwargs or {}),
            )
        except (TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
            # A template raises on roles and orders it does not know, in any of these ways.
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error
