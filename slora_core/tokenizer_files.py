"""What a tokenizer's files say without the tokenizer being made: its tokens, its end, its template.

Cheap enough to be read of every adapter's folder. A file that is missing or is no JSON object says
nothing; who needs one to be right makes the tokenizer itself. It knows neither models nor adapters.
"""

import json
import os
import stat
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
TEXT_FILES = (
    TOKENIZER_FILE,
    CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    ADDED_TOKENS_FILE,
    TEMPLATE_FILE,
    GENERATION_FILE,
)
# Of one file; the largest tokenizers in use have 35 MB.
MAX_FILE_BYTES = 2**27
# Of a token's id; vocabularies have some hundred thousand.
_MAX_ID_DIGITS = 10


class TokenizerFiles:
    """Of one directory; each file is read when it is first needed."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)

    def read(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes | None:
        """A file's bytes; None where it is no regular file, or a larger one."""
        try:
            # Without O_NONBLOCK the opening of a FIFO would wait for a writer for ever.
            descriptor = os.open(self._directory / name, os.O_RDONLY | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                status = os.fstat(file.fileno())
                is_usable = stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes
                return file.read(max_bytes) if is_usable else None
        except OSError:
            return None

    def size(self, name: str) -> int:
        """A file's bytes; 0 where there is none."""
        try:
            return os.stat(self._directory / name).st_size
        except OSError:
            return 0

    def read_object(self, name: str) -> Mapping[str, Any]:
        """A file's JSON object, empty where there is none."""
        return _object(self.read(name))

    @cached_property
    def noted_tokens(self) -> dict[int, str]:
        """Tokens that files beside tokenizer.json name, by id: most of them special."""
        noted: dict[int, str] = {}
        for content, token_id in self.read_object(ADDED_TOKENS_FILE).items():
            _add(noted, token_id, content)
        decoder = self.read_object(CONFIG_FILE).get("added_tokens_decoder")
        for key, entry in decoder.items() if isinstance(decoder, dict) else ():
            named = entry.get("content") if isinstance(entry, dict) else entry
            is_id = key.isdecimal() and len(key) < _MAX_ID_DIGITS
            _add(noted, int(key) if is_id else None, named)
        return noted

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Every token by its id; empty where the files do not list them."""
        return tokens_of(self.read(TOKENIZER_FILE)) | self.noted_tokens

    @property
    def chat_template(self) -> tuple[Any, str]:
        """What stands for a template, None where nothing does, and in which file."""
        data = self.read(TEMPLATE_FILE)
        if data is not None:
            return data.decode(errors="replace"), TEMPLATE_FILE
        found = self.read_object(CONFIG_FILE).get("chat_template")
        if isinstance(found, list):
            # Several with names.
            named = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
            found = named[-1].get("template") if named else None
        return found, CONFIG_FILE

    def special_token(self, name: str) -> str | None:
        """What the tokenizer has for a name such as "eos_token", the end of a text."""
        for file in (CONFIG_FILE, SPECIAL_TOKENS_FILE):
            token = self.read_object(file).get(name)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                return content
        return None

    @property
    def eos_token_id(self) -> int | None:
        token = self.special_token("eos_token")
        if token is None:
            return None
        noted = (token_id for token_id, content in self.noted_tokens.items() if content == token)
        found = next(noted, None)
        if found is None:
            found = next((i for i, content in self.tokens.items() if content == token), None)
        return found


def tokens_of(tokenizer: bytes | None) -> dict[int, str]:
    """Tokens by id of the bytes of a tokenizer.json, those that were added last."""
    fields = _object(tokenizer)
    tokens: dict[int, str] = {}
    model = fields.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        tokens = {i: token for token, i in vocabulary.items() if type(i) is int}
    else:
        # Unigram models: pairs of token and score, in the order of their ids.
        for index, entry in enumerate(_list(vocabulary)):
            _add(tokens, index, entry[0] if isinstance(entry, list) and entry else None)
    for entry in _list(fields.get("added_tokens")):
        if isinstance(entry, dict):
            _add(tokens, entry.get("id"), entry.get("content"))
    return tokens


def end_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids under `eos_token_id` of a config or a generation config: one, several or none."""
    found = fields.get("eos_token_id")
    return tuple(i for i in (found if isinstance(found, list) else [found]) if type(i) is int)


def _object(data: bytes | None) -> Mapping[str, Any]:
    try:
        fields = json.loads(data) if data is not None else {}
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _add(tokens: dict[int, str], token_id: Any, content: Any) -> None:
    is_id = type(token_id) is int and 0 <= token_id < 10**_MAX_ID_DIGITS
    if is_id and isinstance(content, str):
        tokens[token_id] = content
