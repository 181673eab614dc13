"""What of the base model adapters are checked by, and how they lie in pages."""

import json
from pathlib import Path

from app.args import SLoRAArgs
from app.models.source import resolve_model
from slora_core.adapters.adapter_rules import AdapterRules
from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.adapters.whole_tensors import BaseModelTensors
from slora_core.models.registry import load_model_config
from slora_core.text.base_text import BaseText


def adapter_geometry(args: SLoRAArgs) -> AdapterGeometry:
    """The geometry of adapters for the model and engine of these arguments."""
    return AdapterGeometry.of(
        load_model_config(resolve_model(args.model, args.model_revision)), args.engine_config()
    )


def registry_rules(args: SLoRAArgs) -> AdapterRules:
    """By what the registry checks an adapter's files."""
    model_dir = resolve_model(args.model, args.model_revision)
    is_dummy = args.load_format == "dummy"
    return AdapterRules(
        args.unknown_adapter_fields,
        # A model of random weights is nobody's.
        () if is_dummy else _base_names(args, model_dir),
        None if is_dummy else BaseModelTensors(model_dir),
    )


def _base_names(args: SLoRAArgs, model_dir: Path) -> tuple[str, ...]:
    """What the base model is called: by its users, by where it comes from and by its config."""
    origin = json.loads((model_dir / "config.json").read_bytes()).get("_name_or_path")
    names = [args.base_model_name, args.model, str(model_dir), origin]
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str) and name))


def base_text(args: SLoRAArgs) -> BaseText:
    """What the registry compares an adapter's tokenizer files with."""
    model_dir = resolve_model(args.model, args.model_revision)
    return BaseText(model_dir, load_model_config(model_dir).eos_token_ids)
