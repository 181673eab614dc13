"""Reading of what an adapter's folder says of text: what ends one, its template, its tokens.

Called where adapters are registered. It knows no weights, and makes no tokenizer: an adapter's
prompts are encoded by the base model's.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from slora_core.errors import InvalidAdapterError
from slora_core.quoting import plain, quoted
from slora_core.text.adapter_text import AdapterText
from slora_core.text.base_text import BaseText
from slora_core.text.template_sandbox import TemplateSourceError, check_template
from slora_core.tokenizer_files import (
    GENERATION_FILE,
    TEXT_FILES,
    TOKENIZER_FILE,
    TokenizerFiles,
    end_ids,
)

# Tokens that a warning names, and of each so many characters.
_MAX_NAMED = 5
_MAX_TOKEN_CHARS = 40
# Of each file but tokenizer.json, whose bound is the base model's; tokenizers with thousands of
# unused tokens have a tokenizer_config.json of 1.2 MB.
MAX_FILE_BYTES = 1 << 22
# Tokens that end an adapter's texts, as many as a request may name; models have up to five.
MAX_ENDS = 128
# What a template may write of its tokenizer's special tokens.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_adapter_text(directory: str | Path, base: BaseText) -> tuple[AdapterText, tuple[str, ...]]:
    """What a folder says of text, and warnings of what of it is not served.

    Raises:
        InvalidAdapterError: a file (named) is too large, has a chat template that is too long or
            no Jinja, or more ends than any model.
    """
    files = TokenizerFiles(directory)
    _check_sizes(files)
    template = _template(files, base)
    others = base.other_tokens(files)
    ends = [*end_ids(files.read_object(GENERATION_FILE))]
    eos_token = files.special_token("eos_token")
    if eos_token in base.ids:
        ends.append(base.ids[eos_token])
    agreeing = [i for i in dict.fromkeys(ends) if i in base.tokens and i not in others]
    new = tuple(i for i in agreeing if i not in base.eos_token_ids)
    if len(new) > MAX_ENDS:
        raise InvalidAdapterError(
            f"eos_token_id in {GENERATION_FILE} has {len(new)} tokens beside the base model's; at "
            f"most {MAX_ENDS} are allowed"
        )
    return AdapterText(new, template), tuple(_warnings(files, base, others))


def _check_sizes(files: TokenizerFiles) -> None:
    for name in TEXT_FILES:
        size = files.size(name)
        if name != TOKENIZER_FILE and size > MAX_FILE_BYTES:
            raise InvalidAdapterError(
                f"{name} has {size} bytes; at most {MAX_FILE_BYTES} are allowed"
            )


def _warnings(files: TokenizerFiles, base: BaseText, others: dict[int, str]) -> Iterator[str]:
    if others:
        named = [
            f"{i} is {_shown(token)}"
            + (f" and not {_shown(base.tokens[i])}" if i in base.tokens else "")
            for i, token in sorted(others.items())[:_MAX_NAMED]
        ]
        more = f" and {len(others) - len(named)} more" if len(others) > len(named) else ""
        yield (
            "its tokenizer has other tokens than the base model's, which is used for its prompts "
            f"too: {', '.join(named)}{more}"
        )
    size = files.size(TOKENIZER_FILE)
    if size > base.max_tokenizer_bytes:
        yield (
            f"its {TOKENIZER_FILE} has {size} bytes and was not compared with the base model's, "
            "which is used for its prompts too"
        )


def _shown(token: str) -> str:
    return f"'{plain(token, _MAX_TOKEN_CHARS)}'"


def _template(files: TokenizerFiles, base: BaseText) -> str | None:
    """The folder's own template; None where it has none but a copy of the base model's."""
    source, file = files.chat_template
    if source is None:
        return None
    if not isinstance(source, str):
        raise InvalidAdapterError(
            f"the chat template in {file} is {quoted(source)}; it must be a text"
        )
    settings = _own_special_tokens(source, files, base)
    if not settings and source == base.chat_template:
        # An argument for the base model's template is then for this adapter too.
        return None
    try:
        check_template(source)
    except TemplateSourceError as error:
        raise InvalidAdapterError(f"the chat template in {file} {error}") from None
    return settings + source


def _own_special_tokens(source: str, files: TokenizerFiles, base: BaseText) -> str:
    """Jinja that gives a template those special tokens which the folder has others for.

    Only such as are tokens of the base model, whose tokenizer encodes the chat.
    """
    settings = ""
    for name in _SPECIAL_TOKENS:
        token = files.special_token(name)
        is_other = token in base.ids and token != base.files.special_token(name)
        if is_other and re.search(rf"\b{name}\b", source):
            # A line of its own, of which nothing stays: what begins the template begins a line.
            settings += f"{{% set {name} = {ascii(token)} %}}\n"
    return settings
