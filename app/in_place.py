"""What a changed argument costs a deployment that runs: nothing, a call, or its replicas.

Owns the table of which deployment needs which argument when it starts. `build` gives each
deployment its version and its settings from here; the deployments take settings up by
`reconfigure`. It knows no deployment and calls none.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from app.args import DEMO_MODEL_NAME, SLoRAArgs
from app.registry.client import REGISTRY_DEPLOYMENT

REGISTRY, ENGINE, INGRESS = REGISTRY_DEPLOYMENT, "engine", "ingress"

# Options of deployments and of their replicas, of which Serve itself knows what they change.
_OPTIONS = {
    "num_replicas",
    "num_ingress_replicas",
    "min_replicas",
    "max_replicas",
    "target_requests",
    "target_queued_tokens",
    "target_running_tokens",
    "target_page_share",
    "scale_up_delay_s",
    "scale_down_delay_s",
    "scale_to_zero_delay_s",
    "autoscaling_window_s",
    "autoscaling_report_s",
    "max_ingress_replicas",
    "target_ingress_requests",
    "cpus_per_replica",
    "gpus_per_replica",
    "max_ongoing_requests",
    "max_surge_percent",
    "graceful_shutdown_timeout_s",
}

# Taken up by a replica that runs.
_SETTINGS: Mapping[str, tuple[str, ...]] = {
    REGISTRY: ("adapters_dir", "allowed_adapter_roots"),
    ENGINE: ("flush_interval_s", "max_pieces_per_s"),
    INGRESS: (
        "max_queued_requests",
        "max_queued_tokens",
        "max_body_bytes",
        "body_timeout_s",
        "max_inflight_body_bytes",
    ),
}

# Arguments that only these deployments are started with.
_ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    "served_model_name": (REGISTRY, INGRESS),
    "chat_template": (INGRESS,),
    "generation_config": (INGRESS,),
    "unknown_adapter_fields": (REGISTRY,),
    "registry_state_path": (REGISTRY,),
    "num_pool_tokens": (REGISTRY, ENGINE),
    "memory_utilization": (ENGINE,),
    "max_batched_tokens": (ENGINE,),
    "max_running_requests": (ENGINE,),
    "shared_prefill_fraction": (ENGINE,),
    "max_model_len": (ENGINE, INGRESS),
    "prefix_caching": (ENGINE,),
    "admission_output_tokens": (ENGINE,),
    "store_capacity_bytes": (ENGINE,),
    "store_extent_bytes": (ENGINE,),
    "packed_cache_dir": (ENGINE,),
    "packed_cache_bytes": (ENGINE,),
    "num_threads": (ENGINE,),
    "engine_stall_timeout_s": (ENGINE,),
    "failover_timeout_s": (INGRESS,),
    # Serve makes a router once in the life of a process that holds a handle.
    "spill_queue_len": (INGRESS,),
    "spill_factor": (INGRESS,),
}

_PACKAGES = ("app", "slora_core", "kernels")


def settings(deployment: str, args: SLoRAArgs) -> dict[str, Any]:
    """What the deployment's replicas take up while they run, as Serve's `user_config`."""
    return args.model_dump(mode="json", include=set(_SETTINGS[deployment]))


def with_settings(args: SLoRAArgs, changed: Mapping[str, Any]) -> SLoRAArgs:
    """The arguments with `settings` of a later deployment.

    Raises:
        ValueError: a relative path, which only a config file's `user_config` can have.
    """
    paths = [changed.get("adapters_dir"), *changed.get("allowed_adapter_roots", ())]
    for path in paths:
        if path is not None and not Path(path).is_absolute():
            raise ValueError(f"user_config has the relative path {path}; make it absolute")
    return SLoRAArgs.model_validate({**args.model_dump(), **changed})


def started_with(deployment: str) -> set[str]:
    """Arguments for which the deployment's replicas are replaced.

    One that no table names is taken for one of them.
    """
    others = _OPTIONS.union(*_SETTINGS.values())
    return {
        name
        for name in SLoRAArgs.model_fields
        if name not in others and deployment in _ONLY_FOR.get(name, (deployment,))
    }


def code_version(deployment: str, args: SLoRAArgs) -> str:
    """Equal for deployments whose replicas need not be replaced for one another."""
    values = args.model_dump(mode="json", include=started_with(deployment))
    told = json.dumps([_sources(), values], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def model_key(args: SLoRAArgs) -> str:
    """Names the base model: prompts of another one are not computed by its replicas."""
    return f"{args.model or DEMO_MODEL_NAME}@{args.model_revision or ''}"


@cache
def _sources() -> str:
    """A hash of this project's code: another one is another version, whatever the arguments."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
