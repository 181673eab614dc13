"""How adapters of the base model lie in pages: what the registry checks and the stores pack by."""

from app.args import SLoRAArgs
from app.models.source import resolve_model
from slora_core.adapters.page_layout import AdapterGeometry
from slora_core.models.registry import load_model_config


def adapter_geometry(args: SLoRAArgs) -> AdapterGeometry:
    """The geometry of adapters for the model and engine of these arguments."""
    return AdapterGeometry.of(load_model_config(resolve_model(args.model)), args.engine_config())
