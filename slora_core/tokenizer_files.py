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


class TokenizerFiles:
    """Of one directory; each file is read when it is first needed."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None where it is no regular file of at most `MAX_FILE_BYTES`."""
        try:
            # Without O_NONBLOCK the opening of a FIFO would wait for a writer for ever.
            descriptor = os.open(self._directory / name, os.O_RDONLY | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                status = os.fstat(file.fileno())
                is_usable = stat.S_ISREG(status.st_mode) and status.st_size <= MAX_FILE_BYTES
                return file.read(MAX_FILE_BYTES) if is_usable else None
        except OSError:
            return None

    def read_object(self, name: str) -> Mapping[str, Any]:
        """A file's JSON object, empty where there is none."""
        data = self.read(name)
        try:
            fields = json.loads(data) if data is not None else {}
        except (ValueError, RecursionError):
            return {}
        return fields if isinstance(fields, dict) else {}

    @cached_property
    def added_tokens(self) -> dict[int, str]:
        """Tokens beside the vocabulary's own, by id: most of them special."""
        added: dict[int, str] = {}
        for entry in _list(self.read_object(TOKENIZER_FILE).get("added_tokens")):
            if isinstance(entry, dict):
                _add(added, entry.get("id"), entry.get("content"))
        for content, token_id in self.read_object(ADDED_TOKENS_FILE).items():
            _add(added, token_id, content)
        decoder = self.read_object(CONFIG_FILE).get("added_tokens_decoder")
        for key, entry in decoder.items() if isinstance(decoder, dict) else ():
            named = entry.get("content") if isinstance(entry, dict) else entry
            _add(added, int(key) if key.isdecimal() else None, named)
        return added

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token's id; empty where the files do not list them."""
        model = self.read_object(TOKENIZER_FILE).get("model")
        listed = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(listed, dict):
            vocabulary = {token: i for token, i in listed.items() if type(i) is int}
        else:
            # Unigram models: pairs of token and score, in the order of their ids.
            vocabulary = {
                entry[0]: index
                for index, entry in enumerate(_list(listed))
                if isinstance(entry, list) and entry and isinstance(entry[0], str)
            }
        return vocabulary | {content: i for i, content in self.added_tokens.items()}

    @property
    def eos_token(self) -> str | None:
        """What ends a text, as the tokenizer has it."""
        for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE):
            token = self.read_object(name).get("eos_token")
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                return content
        return None

    @property
    def eos_token_id(self) -> int | None:
        token = self.eos_token
        if token is None:
            return None
        added = {content: token_id for token_id, content in self.added_tokens.items()}
        return added[token] if token in added else self.vocabulary.get(token)


def end_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids under `eos_token_id` of a config or a generation config: one, several or none."""
    found = fields.get("eos_token_id")
    return tuple(i for i in (found if isinstance(found, list) else [found]) if type(i) is int)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _add(tokens: dict[int, str], token_id: Any, content: Any) -> None:
    if type(token_id) is int and isinstance(content, str):
        tokens[token_id] = content
