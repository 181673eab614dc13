"""A defect as the ingress logs it: which errors, raised where, and none of their own words.

An error of a library may quote what it was given, a prompt or a piece of an answer.
"""

import traceback
from collections.abc import Iterator


def without_words(error: BaseException) -> str:
    """The tracebacks of an error and of those that led to it, the first one first."""
    parts = []
    for link in reversed([*_chain(error)]):
        frames = "".join(traceback.format_tb(link.__traceback__))
        parts.append(f"{frames}{type(link).__module__}.{type(link).__qualname__}\n")
    return "which led to\n".join(parts)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
