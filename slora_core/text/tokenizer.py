"""Text to token ids and back, over the tokenizer of a Hugging Face model directory.

Owns the fast tokenizer and the chat template. It knows no requests and no streaming
(`detokenizer` cuts the text of a running request); the ingress calls it.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slora_core.errors import InvalidRequestError, UnsupportedModelError

# Characters from which a text is encoded on a thread: shorter ones take under about 2 ms.
LONG_TEXT_CHARS = 8192


class Tokenizer:
    """Encodes prompts and chats, decodes token ids; safe to call from several threads.

    Raises:
        UnsupportedModelError: the directory has no tokenizer that the fast backend can run.
    """

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            hf_tokenizer = AutoTokenizer.from_pretrained(str(path))
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(f"no usable tokenizer in {path}: {error}") from error
        backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedModelError(
                f"the tokenizer in {path} has no fast version (tokenizer.json)"
            )
        # The backend is called directly: the wrapper around it sets truncation at every call,
        # which two threads cannot do at once.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._hf_tokenizer = hf_tokenizer

    @property
    def has_chat_template(self) -> bool:
        return self._hf_tokenizer.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # Unlike encode, encode_batch lets other threads run.
        [encoding] = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`encode` that leaves the event loop free while a long text is encoded."""
        if len(text) < LONG_TEXT_CHARS:
            return self.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens)

    async def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a chat, the model's answer about to begin.

        Raises:
            InvalidRequestError: the template is missing, refuses the messages or fails on them.
        """
        num_chars = sum(len(str(message.get("content", ""))) for message in messages)
        if num_chars < LONG_TEXT_CHARS:
            text = self.render_chat(messages)
        else:
            text = await asyncio.to_thread(self.render_chat, messages)
        return await self.encode_async(text, add_special_tokens=False)

    def render_chat(self, messages: Sequence[dict[str, Any]]) -> str:
        """The chat as text, with the template's own special tokens."""
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise InvalidRequestError(
                "the model has no chat template; use /v1/completions", "messages"
            )
        try:
            return self._hf_tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            # A template raises on roles and orders it does not know, in any of these ways.
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)
