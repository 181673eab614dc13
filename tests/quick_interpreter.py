"""Lets Triton's interpreter call jit functions without preparing `triton.language` for each anew.

It replaces the builtins of the modules that a function sees before every call, for a third of the
time of our kernel tests, and only the end of a launch undoes it: once a launch is enough.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def prepare_once_a_launch() -> None:
    """For the rest of the process; of private parts of Triton, without which all is as before."""
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        return
    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    # By whether a function sees `tl` and `tl.core`, which is what is prepared for it.
    prepared: set[tuple[bool, ...]] = set()

    def prepare_first(fn: Any) -> Any:
        values = list(fn.__globals__.values())
        seen = tuple(any(value is module for value in values) for module in (tl, tl.core))
        if seen in prepared:
            return interpreter._LangPatchScope()
        prepared.add(seen)
        return prepare(fn)

    def launch_anew(*args: Any, **kwargs: Any) -> Any:
        prepared.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang = prepare_first
    interpreter.GridExecutor.__call__ = launch_anew
