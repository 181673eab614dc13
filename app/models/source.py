"""Where the base model lies on this machine: the demo model, a local directory or the hub.

Owns the download of hub models. It knows no engine; every process that needs the model's files
calls it, and all but the first find them there.
"""

import json
from pathlib import Path

from app.models.demo import ensure_demo_model
from slora_core.adapters.peft_config import CONFIG_FILE, MAX_CONFIG_BYTES
from slora_core.errors import UnsupportedModelError
from slora_core.quoting import plain

# Weights as the engine reads them, configs, tokenizers and templates. Some repositories hold the
# weights a second time, as consolidated.safetensors or pickled.
HUB_PATTERNS = ["model*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


def resolve_model(model: str | None, revision: str | None = None) -> Path:
    """Local directory of the base model, fetched first where it must be.

    `revision` is a branch, tag or commit of a hub model.

    Raises:
        UnsupportedModelError: neither a directory nor a model that the hub gives.
        DemoModelError: the demo model could not be fetched or converted.
    """
    if model is None:
        return ensure_demo_model()
    path = Path(model).expanduser()
    if path.is_dir():
        _refuse_adapter(path)
        return path.resolve()
    if path.is_absolute() or model.startswith((".", "~")):
        raise UnsupportedModelError(f"model: the directory {path} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS))
    except Exception as error:
        # The hub's client raises errors of several libraries, for the net, for access and names.
        raise UnsupportedModelError(
            f"model: {model!r}{f' at {revision!r}' if revision else ''} is no local directory, and "
            f"the Hugging Face hub gave: {error}"
        ) from error


def resolve_revision(model: str | None, revision: str | None) -> str | None:
    """The commit that a hub model's revision is now; None for what is no hub model.

    Every process that is given it serves the same files, whatever becomes of the branch.

    Raises:
        UnsupportedModelError: as `resolve_model`; or a revision of a local directory.
    """
    directory = resolve_model(model, revision)
    if directory.parent.name == "snapshots" and not (model and Path(model).expanduser().is_dir()):
        return directory.name
    if revision is not None:
        raise UnsupportedModelError(
            f"model_revision is {revision!r}, and {model or 'the demo model'} is not of the hub"
        )
    return None


def _refuse_adapter(path: Path) -> None:
    """Raises UnsupportedModelError where a directory has an adapter in place of a model."""
    config = path / CONFIG_FILE
    if (path / "config.json").exists() or not config.exists():
        return
    try:
        with open(config, "rb") as file:
            base = json.loads(file.read(MAX_CONFIG_BYTES))["base_model_name_or_path"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        base = None
    shown = plain(str(base)) if base else "an unknown base model"
    raise UnsupportedModelError(
        f"model: {path} is a LoRA adapter of {shown}, not a model; give "
        "its base as model, and the directory that it lies in as adapters_dir"
    )
