"""`rank_pattern` and `alpha_pattern` of an adapter's config: values by patterns of module names.

Patterns are a user's input, so they are matched by RE2, which never backtracks: in time linear in
the name, and in bounded memory. Lookahead and back references, which it lacks, are refused.
"""

from collections.abc import Mapping
from typing import Generic, TypeVar

import re2

T = TypeVar("T")

# Of the largest models each module has a pattern of its own: 126 layers of 7.
MAX_PATTERNS = 1024
MAX_PATTERN_CHARS = 1024
# What RE2 may compile one pattern to.
MAX_PATTERN_BYTES = 2**20


class PatternError(ValueError):
    """Patterns that cannot be matched, and why."""


class ModulePatterns(Generic[T]):
    """Values by the first pattern that matches a module's name.

    Raises:
        PatternError: too many patterns, one that is too long, or that RE2 does not take.
    """

    def __init__(self, values: Mapping[str, T]) -> None:
        if len(values) > MAX_PATTERNS:
            raise PatternError(f"{len(values)} patterns; at most {MAX_PATTERNS} are supported")
        options = re2.Options()
        options.max_mem = MAX_PATTERN_BYTES
        options.log_errors = False
        self._values = [(_compiled(key, options), value) for key, value in values.items()]

    def __len__(self) -> int:
        return len(self._values)

    def value_of(self, module_name: str) -> T | None:
        """Of the first pattern that matches the whole name or a dotted tail of it.

        This is the rule of `peft.utils.other.get_pattern_key`, order of patterns included.
        """
        return next((value for key, value in self._values if key.match(module_name)), None)


def _compiled(key: str, options: re2.Options) -> "re2._Regexp":
    if len(key) > MAX_PATTERN_CHARS:
        raise PatternError(
            f"the pattern {key[:40]!r}... has {len(key)} characters; at most {MAX_PATTERN_CHARS} "
            "are supported"
        )
    try:
        return re2.compile(rf"(.*\.)?({key})$", options)
    except re2.error as error:
        [reason] = error.args
        reason = reason.decode(errors="replace") if isinstance(reason, bytes) else reason
        raise PatternError(f"{key!r} is not a regular expression of RE2: {reason}") from None
