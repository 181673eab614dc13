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


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ('{"base_model_name_or_path": "org/base-7b"}', "org/base-7b"),
        ("{}", "an unknown base model"),
    ],
)
def test_an_adapter_in_place_of_a_model_is_told(tmp_path, config, base):
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(UnsupportedModelError, match=f"is a LoRA adapter of {base}, not a model"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
