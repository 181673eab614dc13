"""Whether an adapter's `base_model_name_or_path` names another model than the one that is served.

A name decides nothing, since the tensors must fit either way; it is worth a warning where it
plainly is another model's. Models are called by many names, so what a copy, a cache or a
quantization adds is taken off, and a path, whose folders may have any name, accuses nobody.
"""

import re
from collections.abc import Collection

# The model's folder in a hub cache.
_CACHED = re.compile(r"(?:^|[/\\])models--(?P<org>[^/\\]+?)--(?P<name>[^/\\]+)")
# Of the same weights in other types and files. Names of fine-tunes stay: Instruct is another model.
_SUFFIXES = re.compile(
    r"(-(unsloth|bnb|gptq|awq|gguf|hf|mlx|exl2|fp8|fp16|bf16|int[48]|[48]-?bit|dynamic|quantized))+$"
)

# Nobody's path is longer, and the expressions above take the square of the length.
_MAX_NAME = 1024


def is_other_base(name: str, served: Collection[str]) -> bool:
    """Whether a file's name of its base is surely of none of the served model's names."""
    name = name[-_MAX_NAME:]
    cached = _CACHED.search(name)
    if cached is None and _is_local(name):
        return False
    ours = {_essence(other) for other in served} - {""}
    return bool(ours) and _essence(name) not in ours | {""}


def _is_local(name: str) -> bool:
    """Neither `model` nor `organisation/model`."""
    return name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1


def _essence(name: str) -> str:
    """The last part of a name, without what does not tell one model from another."""
    cached = _CACHED.search(name)
    last = cached["name"] if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    dashed = re.sub(r"[._\s-]+", "-", last.casefold()).strip("-")
    return _SUFFIXES.sub("", dashed.removeprefix("meta-"))
