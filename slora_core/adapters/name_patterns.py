"""Which key of a `rank_pattern` or `alpha_pattern` is for a module.

Owns PEFT's rule of matching and what it may cost: a key is a regular expression of whoever made
the adapter, and Python's `re` can take minutes over one with the GIL held. RE2 matches in time
linear in the name, whatever the expression; number, length and size of the keys are bounded here.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import re2

from slora_core.quoting import plain, quoted

# EVA writes a key for every module: 882 of 45 characters for the largest Llama.
MAX_KEYS = 1024
MAX_KEY_CHARS = 1024
MAX_TOTAL_CHARS = 1 << 17
# RE2 instructions of all keys that are more than a name; twenty keys like
# `.*\.[0-9]\.self_attn\..*` have 1,000. The worst of that size take 0.3 s on that model.
MAX_PROGRAM_SIZE = 1 << 12
# Bytes of RE2's memory for one key, so that a key of the size above still compiles.
_MAX_MEMORY = 1 << 18

# A name or its tail, with or without what makes a dot a dot and not any character.
_NAME = re.compile(r"\^?(?:\w|\\?\.)+\$?", re.ASCII)
# What Python and RE2 both take and read differently: `[[:alpha:]]`, `a{,3}`.
_READ_DIFFERENTLY = re.compile(r"\[:|\{,\d*\}")


class PatternError(ValueError):
    """Keys that are not matched, or this `key`, with the reason."""

    def __init__(self, reason: str, key: str | None = None) -> None:
        super().__init__(reason)
        self.key = key


def check_keys(keys: Collection[str]) -> None:
    """Raises `PatternError` for a key that PEFT and RE2 do not read alike, or beyond the bounds."""
    if len(keys) > MAX_KEYS:
        raise PatternError(f"it has {len(keys)} keys; at most {MAX_KEYS} are allowed")
    total = sum(map(len, keys))
    if total > MAX_TOTAL_CHARS:
        raise PatternError(
            f"its keys have {total} characters; at most {MAX_TOTAL_CHARS} are allowed"
        )
    size = 0
    for key in keys:
        if len(key) > MAX_KEY_CHARS:
            raise PatternError(
                f"a key has {len(key)} characters; at most {MAX_KEY_CHARS} are allowed", key
            )
        if _NAME.fullmatch(key):
            continue
        size += _checked(key).programsize
        if size > MAX_PROGRAM_SIZE:
            raise PatternError(
                f"its keys are too large as regular expressions: {size} instructions up to this "
                f"one, at most {MAX_PROGRAM_SIZE} are allowed",
                key,
            )


def first_keys(keys: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """The first key that matches a name whole or a dotted tail of it, of each name that has one.

    This is the rule of `peft.utils.other.get_pattern_key`, order of keys included. The keys are
    those that `check_keys` took.
    """
    found: dict[str, str] = {}
    left = {name: name.encode() for name in names}
    tails = _by_length(left)
    for key in keys:
        if not left:
            break
        if _NAME.fullmatch(key):
            matching = _named_by(key, tails)
        else:
            # Compiled for this loop alone, since RE2 remembers in each what it has matched.
            expression = _compiled(key)
            matching = [name for name, text in left.items() if expression.match(text)]
        for name in matching:
            if left.pop(name, None) is not None:
                found[name] = key
    return found


def _by_length(names: Iterable[str]) -> Mapping[int, Mapping[str, Sequence[str]]]:
    """The dotted tails of names, the whole ones too, by their length, each with its names."""
    tails: dict[int, dict[str, list[str]]] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            tail = ".".join(parts[start:])
            tails.setdefault(len(tail), {}).setdefault(tail, []).append(name)
    return tails


def _named_by(key: str, tails: Mapping[int, Mapping[str, Sequence[str]]]) -> list[str]:
    """What a key that is a name matches: most names at all are longer, shorter or end otherwise."""
    text = key.strip("^$").replace("\\.", ".")
    end = text.rpartition(".")[2]
    candidates = {
        tail: names for tail, names in tails.get(len(text), {}).items() if tail.endswith(end)
    }
    if not candidates:
        return []
    expression = _compiled(key)
    return [
        name
        for tail, names in candidates.items()
        if expression.match(tail.encode())
        for name in names
        if name == tail or not key.startswith("^")
    ]


def _checked(key: str) -> Any:
    """RE2's expression of a key, which Python's `re` takes for the same."""
    if not key.isascii():
        raise PatternError("names of modules are ASCII, so a pattern for them must be too", key)
    if _READ_DIFFERENTLY.search(key):
        raise PatternError(
            "RE2, which matches it, reads [: and {, otherwise than PEFT does; write it without", key
        )
    try:
        expression = _compiled(key)
    except re2.error as error:
        (reason,) = error.args
        text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        raise PatternError(
            "it must be a regular expression that RE2 can match without backtracking, so without "
            f"lookaround and backreferences: {quoted(text)}",
            key,
        ) from None
    try:
        # What is none to Python was none to PEFT. After RE2, which takes none that costs much.
        re.compile(_expression(key))
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(
            f"it is no regular expression of Python's re, by which PEFT reads it: "
            f"{plain(str(error))}",
            key,
        ) from None
    return expression


def _compiled(key: str) -> Any:
    options = re2.Options()
    options.max_mem = _MAX_MEMORY
    options.log_errors = False
    options.never_capture = True
    return re2.compile(_expression(key).encode(), options)


def _expression(key: str) -> str:
    return rf"(.*\.)?({key})$"
