"""What somebody's files say, as an error or a warning may repeat it: one short line.

Whatever a file holds (line ends, lone surrogates, megabytes) must fit a log and an answer's JSON.
"""

import json
from typing import Any

MAX_NAME = 160
MAX_VALUE = 80


def plain(text: str, limit: int = MAX_NAME) -> str:
    """A name or a message without quotes; what cannot be printed is escaped."""
    return _cut(repr(text[: limit + 1])[1:-1], limit)


def quoted(value: Any, limit: int = MAX_VALUE) -> str:
    """A value as JSON would write it."""
    try:
        return _cut(json.dumps(value, default=str), limit)
    except RecursionError:
        return "a deeply nested value"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
