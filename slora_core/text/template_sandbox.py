"""Chat templates: Jinja source that may be anybody's, compiled and run in a sandbox with bounds.

They see what they would in transformers. A template cannot reach out of the sandbox, loop without
end or write without end; what one operation on a text may take is not bounded. It knows neither
models nor adapters.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slora_core.quoting import plain

# Characters of a template's source; the longest in use, with tools, have some 20,000.
MAX_SOURCE_CHARS = 2**16
# Turns of all loops, and calls, of one chat; a template takes some tens for each message, and so
# many a second or less.
MAX_TURNS = 500_000
# Characters of one chat's text, twice the largest body by default.
MAX_TEXT_CHARS = 2**24
# Each takes about 0.2 MB.
MAX_COMPILED = 256
# Sources found right, which the next adapters of one trainer have too.
MAX_CHECKED = 16

# A variable that no template can name, nor set.
_BUDGET = "turns left"


class TemplateSourceError(ValueError):
    """A template that cannot be used; the message goes on after what it is and where it is from."""


def check_template(source: str) -> None:
    """Raises TemplateSourceError for one that is too long or that Jinja does not compile."""
    if len(source) > MAX_SOURCE_CHARS:
        raise TemplateSourceError(
            f"has {len(source)} characters; at most {MAX_SOURCE_CHARS} are supported"
        )
    try:
        source.encode()
        _check_compiles(source)
    except UnicodeEncodeError:
        raise TemplateSourceError("has half of a surrogate pair, which is no text") from None
    except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = "" if line is None else f" in line {line}"
        raise TemplateSourceError(f"is not valid Jinja{where}: {plain(str(error))}") from None


def render_template(source: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes of these variables.

    Whatever a template raises comes out: it may divide by zero.

    Raises:
        SecurityError: it reaches out of the sandbox or goes beyond a bound.
        TemplateError: it refuses the variables.
        UnicodeEncodeError: it writes half of a surrogate pair.
    """
    pieces: list[str] = []
    num_chars = 0
    for piece in _compiled(source).generate({**variables, _BUDGET: _Budget()}):
        pieces.append(piece)
        num_chars += len(piece)
        if num_chars > MAX_TEXT_CHARS:
            raise SecurityError(f"it writes more than {MAX_TEXT_CHARS} characters")
    text = "".join(pieces)
    # What is no text no tokenizer takes.
    text.encode()
    return text


class _Budget:
    """What is left of `MAX_TURNS` to one rendering."""

    def __init__(self) -> None:
        self._num_left = MAX_TURNS

    def take(self) -> None:
        self._num_left -= 1
        if self._num_left < 0:
            raise SecurityError(f"its loops take more than {MAX_TURNS} turns")


class _Counted:
    """Something to loop over whose turns count."""

    def __init__(self, items: Any, budget: _Budget) -> None:
        self._items = items
        self._budget = budget

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._budget.take()
            yield item

    def __len__(self) -> int:
        return len(self._items)


class _Environment(ImmutableSandboxedEnvironment):
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Names as Jinja has them, so that a template's own arguments may have any. Macros call
        # one another.
        __context[_BUDGET].take()
        return super().call(__context, __obj, *args, **kwargs)


class _Generation(Extension):
    """`{% generation %}`, by which transformers finds an assistant's words for training."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> _Counted:
    return _Counted(items, context[_BUDGET])


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _make_environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters |= {"tojson": _tojson, _counted.__name__: _counted}
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


_ENVIRONMENT = _make_environment()


def _compile(source: str) -> Template:
    tree = _ENVIRONMENT.parse(source)
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(
            loop.iter, _counted.__name__, [], [], None, None, lineno=loop.lineno
        )
    return _ENVIRONMENT.from_string(tree)


_compiled = lru_cache(MAX_COMPILED)(_compile)


@lru_cache(MAX_CHECKED)
def _check_compiles(source: str) -> None:
    _compile(source)
