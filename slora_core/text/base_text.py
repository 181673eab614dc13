"""The base model's side of text, which adapters' folders are compared with: its tokens and ends."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from slora_core.tokenizer_files import TOKENIZER_FILE, TokenizerFiles, tokens_of

# How much larger than the base model's an adapter's tokenizer.json may be and is still compared: a
# trainer adds some tokens and writes it in its own way.
MAX_SIZE_RATIO = 2
MAX_SIZE_MORE = 2**20
# Other tokenizer files whose comparison is kept: one trainer gives all its adapters the same.
MAX_COMPARED = 16


class BaseText:
    """Read once for all adapters, and what it has found of their tokenizers kept.

    An unchanged copy of the base model's tokenizer.json, as most folders have, is only compared.
    Safe to call from several threads.
    """

    def __init__(self, model_dir: str | Path, eos_token_ids: tuple[int, ...]) -> None:
        self.files = TokenizerFiles(model_dir)
        self.eos_token_ids = eos_token_ids
        # By what their files hash to.
        self._others: dict[bytes, Mapping[int, str]] = {}

    @cached_property
    def tokens(self) -> dict[int, str]:
        """By id."""
        return tokens_of(self._tokenizer) | self.files.noted_tokens

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: token_id for token_id, token in self.tokens.items()}

    @cached_property
    def chat_template(self) -> Any:
        return self.files.chat_template[0]

    @property
    def max_tokenizer_bytes(self) -> int:
        """Of an adapter's tokenizer.json that is compared."""
        return MAX_SIZE_RATIO * len(self._tokenizer or b"") + MAX_SIZE_MORE

    def other_tokens(self, files: TokenizerFiles) -> dict[int, str]:
        """Tokens that a folder's files list and the base model has not, or has another for."""
        tokenizer = files.read(TOKENIZER_FILE, self.max_tokenizer_bytes)
        listed = {} if tokenizer is None else self._others_of(tokenizer)
        return {**listed, **self._differing(files.noted_tokens)}

    @cached_property
    def _tokenizer(self) -> bytes | None:
        return self.files.read(TOKENIZER_FILE)

    def _others_of(self, tokenizer: bytes) -> Mapping[int, str]:
        if tokenizer == self._tokenizer:
            return {}
        digest = hashlib.sha256(tokenizer).digest()
        found = self._others.get(digest)
        if found is None:
            found = self._differing(tokens_of(tokenizer))
            if len(self._others) >= MAX_COMPARED:
                self._others.clear()
            self._others[digest] = found
        return found

    def _differing(self, tokens: Mapping[int, str]) -> dict[int, str]:
        return {i: token for i, token in tokens.items() if self.tokens.get(i) != token}
