"""Text to token ids and back, over the tokenizer of a Hugging Face model directory.

Owns the fast tokenizer and has the chat template. It knows no requests and no streaming
(`detokenizer` cuts the text of a running request); the ingress calls it.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slora_core.errors import PromptTooLongError, UnsupportedModelError
from slora_core.text.bounded_encoding import BoundedEncoder
from slora_core.text.chat_template import ChatTemplate
from slora_core.text.incremental_decoder import IncrementalDecoder

# Characters from which a text is encoded on a thread: shorter ones take under about 2 ms.
LONG_TEXT_CHARS = 8192


class Tokenizer:
    """Encodes prompts and chats, decodes token ids; safe to call from several threads.

    `chat_template` is Jinja source in place of the directory's.

    Raises:
        UnsupportedModelError: the directory has no tokenizer that the fast backend can run.
    """

    def __init__(self, path: str | Path, chat_template: str | None = None) -> None:
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
        self._encoder = BoundedEncoder(backend)
        added = backend.get_added_tokens_decoder()
        self._special_tokens = {
            token.content: token_id for token_id, token in added.items() if token.special
        }
        self.special_ids = frozenset(self._special_tokens.values())
        self.chat_template = ChatTemplate(hf_tokenizer, chat_template)

    def encode(
        self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        """Token ids of a text.

        Raises:
            PromptTooLongError: it certainly has more than `max_tokens`.
        """
        token_ids = self._encoder.encode(text, max_tokens, add_special_tokens)
        if token_ids is None:
            assert max_tokens is not None
            raise PromptTooLongError(max_tokens)
        return token_ids

    async def encode_async(
        self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[int]:
        """`encode` that leaves the event loop free while a long text is encoded."""
        if len(text) < LONG_TEXT_CHARS:
            return self.encode(text, add_special_tokens, max_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens, max_tokens)

    async def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        template_kwargs: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        template: str | None = None,
    ) -> list[int]:
        """Token ids of a chat, the model's answer about to begin.

        `template_kwargs` are what the chat template sees beside the messages; `template` is one in
        place of the model's.

        Raises:
            InvalidRequestError: as `ChatTemplate.render`.
            PromptTooLongError: as `encode`.
        """
        num_chars = sum(len(str(message.get("content", ""))) for message in messages)
        if num_chars < LONG_TEXT_CHARS:
            text = self.chat_template.render(messages, template_kwargs, template)
        else:
            text = await asyncio.to_thread(
                self.chat_template.render, messages, template_kwargs, template
            )
        return await self.encode_async(text, False, max_tokens)

    def decoder(self, prompt_ids: Sequence[int] = ()) -> IncrementalDecoder:
        """Of the text that follows on a prompt."""
        return IncrementalDecoder(self._backend, prompt_ids, self.special_ids)

    def special_token_id(self, text: str) -> int | None:
        """The special token that is written so, which no text shows; None where there is none."""
        return self._special_tokens.get(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)
