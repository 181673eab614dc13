"""Reading of what an adapter's folder says of text: what ends one, its template, its tokens.

Called where adapters are registered. It knows no weights, and makes no tokenizer: an adapter's
prompts are encoded by the base model's.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from slora_core.errors import InvalidAdapterError
from slora_core.text.adapter_text import AdapterText
from slora_core.text.template_sandbox import TemplateSourceError, check_template
from slora_core.tokenizer_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    TokenizerFiles,
    end_ids,
)

# Tokens that a warning names.
_MAX_NAMED = 5


class BaseText:
    """The base model's side: its tokens, and what ends its texts already."""

    def __init__(self, model_dir: str | Path, eos_token_ids: tuple[int, ...]) -> None:
        self._files = TokenizerFiles(model_dir)
        self.eos_token_ids = eos_token_ids

    @cached_property
    def tokenizer_bytes(self) -> bytes | None:
        return self._files.read(TOKENIZER_FILE)

    @cached_property
    def tokens(self) -> dict[int, str]:
        return {token_id: token for token, token_id in self._files.vocabulary.items()}


def read_adapter_text(directory: str | Path, base: BaseText) -> tuple[AdapterText, tuple[str, ...]]:
    """What a folder says of text, and warnings of what of it is not served.

    Raises:
        InvalidAdapterError: a chat template that is too long or no Jinja, with the file's name.
    """
    files = TokenizerFiles(directory)
    template = _template(files)
    own = _own_tokens(files, base)
    others = {i: token for i, token in own.items() if base.tokens.get(i) != token}
    warnings = []
    if others:
        named = [
            f"{i} is {token!r}" + (f" and not {base.tokens[i]!r}" if i in base.tokens else "")
            for i, token in sorted(others.items())[:_MAX_NAMED]
        ]
        more = f" and {len(others) - len(named)} more" if len(others) > len(named) else ""
        warnings.append(
            "its tokenizer has other tokens than the base model's, which is used for its prompts "
            f"too: {', '.join(named)}{more}"
        )
    ends = [*end_ids(files.read_object(GENERATION_FILE))]
    eos_token = files.eos_token
    ends += [i for i, token in base.tokens.items() if token == eos_token]
    agreeing = [i for i in dict.fromkeys(ends) if i in base.tokens and i not in others]
    new = tuple(i for i in agreeing if i not in base.eos_token_ids)
    return AdapterText(new, template), tuple(warnings)


def _own_tokens(files: TokenizerFiles, base: BaseText) -> Mapping[int, str]:
    """Tokens that the folder lists, by id; only added ones where the rest is the base's."""
    tokenizer = files.read(TOKENIZER_FILE)
    if tokenizer is None or tokenizer == base.tokenizer_bytes:
        return files.added_tokens
    return {token_id: token for token, token_id in files.vocabulary.items()}


def _template(files: TokenizerFiles) -> str | None:
    data = files.read(TEMPLATE_FILE)
    if data is not None:
        return _checked(data.decode(errors="replace"), TEMPLATE_FILE)
    found = files.read_object(CONFIG_FILE).get("chat_template")
    if isinstance(found, list):
        # Several with names.
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return None if found is None else _checked(found, CONFIG_FILE)


def _checked(template: Any, file: str) -> str:
    if not isinstance(template, str):
        shown = json.dumps(template, default=str)[:80]
        raise InvalidAdapterError(f"the chat template in {file} is {shown}; it must be a text")
    try:
        check_template(template)
    except TemplateSourceError as error:
        raise InvalidAdapterError(f"the chat template in {file} {error}") from None
    return template
