"""Checks of what a user names to the registry: adapter names and paths. Pure functions."""

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from slora_core.adapters.peft_config import CONFIG_FILE
from slora_core.adapters.peft_weights import WEIGHTS_FILE
from slora_core.errors import AdapterNameError, AdapterPathError, UnsupportedPathError
from slora_core.tokenizer_files import TEXT_FILES

# What needs no escape in a URL's path or a shell's double quotes.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+=,~()-]{0,127}")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The Hugging Face hub's cache: <repository>/snapshots/<commit>, whose files are links into
# <repository>/blobs.
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"
_REPOSITORY_PREFIX = "models--"
# How much of a user's text an error repeats.
_MAX_SHOWN = 200
# Names listed in the error for one that is not registered.
_MAX_NAMES_SHOWN = 8


def check_name(name: str, reserved: Collection[str]) -> None:
    """Raises `AdapterNameError` for bad syntax or a reserved name (the base model's)."""
    if not _NAME.fullmatch(name):
        raise AdapterNameError(
            f"adapter name {name[:_MAX_SHOWN]!r} is not 1 to 128 letters, digits and ._:/@+=,~()- "
            "that start with a letter or digit"
        )
    if not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise AdapterNameError(
            f"adapter name {name!r} has an empty part, . or .. between slashes, which URLs lose"
        )
    if name in reserved:
        raise AdapterNameError(f"adapter name {name!r} is the base model's name")


def confined_path(path: str | Path, roots: Sequence[Path]) -> Path:
    """The real path of an adapter directory that lies, with its files, in one of `roots`.

    `roots` are real paths; a relative path is looked up under each of them. The files of a snapshot
    in a hub cache under a root may lie among the blobs of the snapshot's own repository. Nothing is
    said of what exists elsewhere.

    Raises:
        AdapterPathError: it lies elsewhere once symbolic links are followed, or is no path.
        UnsupportedPathError: what it names is no directory at all.
    """
    shown = repr(str(path)[:_MAX_SHOWN])
    url = _URL.match(str(path))
    if url is not None:
        raise UnsupportedPathError(
            f"adapter path {shown} is a {url[1]}:// address; only directories are served yet"
        )
    try:
        candidates = [path] if os.path.isabs(path) else [root / path for root in roots]
        real = [Path(os.path.realpath(candidate)) for candidate in candidates]
        inside = [directory for directory in real if _all_inside(directory, roots)]
        existing = [directory for directory in inside if directory.exists()]
        # What is no text no answer and no log can repeat; a link may lead there.
        for directory in inside:
            str(directory).encode()
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise AdapterPathError(f"adapter path {shown}: {reason}") from None
    if not inside:
        allowed = ", ".join(map(str, roots)) or "none are configured"
        raise AdapterPathError(f"adapter path {shown} is outside the allowed roots: {allowed}")
    if not existing and _HUB_ID.fullmatch(str(path)):
        raise UnsupportedPathError(
            f"adapter path {shown} is no directory under the allowed roots; if it is the id of a "
            "repository on the hub: only directories are served yet"
        )
    return (existing or inside)[0]


def listed(names: Collection[str]) -> str:
    """A short list of the registered names."""
    if not names:
        return "none are loaded"
    shown = sorted(names)[:_MAX_NAMES_SHOWN]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"loaded are {', '.join(shown)}{more}"


def _all_inside(directory: Path, roots: Sequence[Path]) -> bool:
    if not _is_inside(directory, roots):
        return False
    repository = _hub_repository(directory)
    allowed = roots if repository is None else [*roots, repository / _BLOBS]
    names = (CONFIG_FILE, WEIGHTS_FILE, *TEXT_FILES)
    files = [os.path.realpath(directory / name) for name in names]
    return all(_is_inside(Path(file), allowed) for file in files)


def _is_inside(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _hub_repository(directory: Path) -> Path | None:
    """The repository in a hub cache that a directory is (in) a snapshot of."""
    for snapshot in (directory, *directory.parents):
        repository = snapshot.parent.parent
        is_snapshot = snapshot.parent.name == _SNAPSHOTS
        if is_snapshot and repository.name.startswith(_REPOSITORY_PREFIX):
            return repository
    return None
