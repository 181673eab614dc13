"""A chat as the text that a model was trained on, by the template in its files or an adapter's."""

from collections.abc import Mapping, Sequence
from typing import Any

from slora_core.errors import InvalidRequestError
from slora_core.quoting import plain
from slora_core.text.template_sandbox import render_template

# Characters of a template's own reason to refuse.
MAX_REASON = 400


class ChatTemplate:
    """`hf_tokenizer` is a tokenizer of transformers.

    `source` is the base model's, None that of its files.
    """

    def __init__(self, hf_tokenizer: Any, source: str | None = None) -> None:
        found = hf_tokenizer.chat_template
        # Several with names.
        of_files = found.get("default") if isinstance(found, dict) else found
        self._source: str | None = of_files if source is None else source
        self._special_tokens: Mapping[str, str] = hf_tokenizer.special_tokens_map

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
        if source is None:
            source = self._source
        if source is None:
            raise InvalidRequestError(
                "the model has no chat template; use /v1/completions, or give the server one by "
                "its argument chat_template",
                "messages",
            )
        variables = {
            **self._special_tokens,
            **(kwargs or {}),
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            return render_template(source, variables)
        except Exception as error:
            # A template raises on roles and orders it does not know, in any way that there is.
            reason = plain(str(error), MAX_REASON)
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {reason}", "messages"
            ) from error
