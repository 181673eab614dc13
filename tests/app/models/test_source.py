"""Where a base model lies: a directory of this machine, or the hub, whose download is faked."""

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from app.models.source import resolve_model, resolve_revision
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

    def snapshot_download(repo_id, revision, allow_patterns):
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


COMMITS = {None: "c0ffee1", "main": "c0ffee1", "v2": "abad1de"}
COMMITS |= {commit: commit for commit in COMMITS.values()}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose branches move; what was asked of it."""
    asked = []

    def snapshot_download(repo_id, revision, allow_patterns):
        asked.append(revision)
        if revision not in COMMITS:
            raise ValueError("404: no such revision")
        path = tmp_path / "models--org--name" / "snapshots" / COMMITS[revision]
        path.mkdir(parents=True, exist_ok=True)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize(("revision", "commit"), list(COMMITS.items()))
def test_a_revision_is_resolved_to_a_commit_once(hub, monkeypatch, revision, commit):
    fixed = resolve_revision("org/name", revision)
    assert fixed == commit
    # The branch moves on; who was given the commit does not.
    monkeypatch.setitem(COMMITS, revision, commit)
    monkeypatch.setitem(COMMITS, None, "decade5")
    assert resolve_model("org/name", fixed).name == commit
    assert hub == [revision, commit]


def test_a_revision_that_is_none_is_told(hub, tmp_path):
    with pytest.raises(UnsupportedModelError, match="'org/name' at 'v9' .* 404: no such revision"):
        resolve_revision("org/name", "v9")
    with pytest.raises(
        UnsupportedModelError, match="model_revision is 'v2', and .* not of the hub"
    ):
        resolve_revision(str(tmp_path), "v2")
    assert resolve_revision(str(tmp_path), None) is None
