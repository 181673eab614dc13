"""What of the base model adapters are checked by, and how they lie in pages."""

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
    names = {args.model or args.base_model_name, args.base_model_name}
    is_dummy = args.load_format == "dummy"
    return AdapterRules(
        args.unknown_adapter_fields,
        # A model of random weights is nobody's.
        frozenset() if is_dummy else frozenset(names),
        None if is_dummy else BaseModelTensors(resolve_model(args.model, args.model_revision)),
    )


def base_text(args: SLoRAArgs) -> BaseText:
    """What the registry compares an adapter's tokenizer files with."""
    model_dir = resolve_model(args.model, args.model_revision)
    return BaseText(model_dir, load_model_config(model_dir).eos_token_ids)
