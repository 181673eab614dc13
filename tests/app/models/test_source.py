"""Where a base model lies: a directory of this machine, or the hub, whose download is faked."""

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from app.models.source import resolve_model
from slora_core.errors import UnsupportedModelError

REPOSITORY = [
    "README.md",
    "chat_template.jinja",
    "config.json",
    "consolidated.safetensors",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "original/consolidated.00.pth",
    "pytorch_model.bin",
    "tokenizer.json",
    "tokenizer.model",
]


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Files of each download by its repository; `tmp_path` is where every one of them lies."""
    files = {}

    def snapshot_download(repo_id, allow_patterns):
        if repo_id == "org/gated":
            raise PermissionError("401: log in first")
        files[repo_id] = list(filter_repo_objects(REPOSITORY, allow_patterns=allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return files


def test_a_hub_id_is_fetched_without_what_the_engine_does_not_read(downloads, tmp_path):
    assert resolve_model("org/name") == tmp_path
    unread = {
        "README.md",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
    }
    assert set(REPOSITORY) - set(downloads["org/name"]) == unread


def test_what_the_hub_says_is_told(downloads):
    with pytest.raises(UnsupportedModelError, match="'org/gated' is no local .* 401: log in first"):
        resolve_model("org/gated")


def test_a_local_directory_is_not_looked_up(downloads, tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == tmp_path / "org" / "name"
    for path in (str(tmp_path / "none"), "./none", "~/none"):
        with pytest.raises(UnsupportedModelError, match="none does not exist"):
            resolve_model(path)
    assert downloads == {}
