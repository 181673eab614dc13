"""S-LoRA's server command: many adapters over one model setting, behind the OpenAI API.

`python launch_server.py --num-adapter 100 --num-token 10000 --model-setting Real`, from this
folder; `--dummy` takes random weights instead. The application is that of serve_configs/slora.yaml.
It serves until Ctrl-C and removes what it made; `run_exp.py` sends the load.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The packages, and not this folder, whose trace.py would hide Python's own.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
import tempfile
from typing import Any

from app.args import SLoRAArgs
from app.models.demo import DemoModelError
from benchmarks.report import ROOT
from benchmarks.serving.local_server import (
    ServerError,
    config_args,
    say,
    serve_until_stopped,
    stop_on_signals,
)
from benchmarks.serving.server_files import (
    adapter_dirs,
    make_dummy_adapters,
    make_dummy_model,
    number_adapters,
)
from benchmarks.serving.settings import SETTINGS
from slora_core.errors import SLoRAError

SHIPPED_ADAPTERS = ROOT / "serve_configs" / "adapters"
# Of the memory that is free at the start: what the store of packed adapters may take.
MAX_STORE_SHARE = 0.5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-setting", choices=list(SETTINGS), default="Real")
    parser.add_argument("--num-adapter", type=int, default=100, help="adapters (default 100)")
    parser.add_argument(
        "--num-token", type=int, help="size of the pool that KV and adapters share, tokens of KV"
    )
    parser.add_argument("--dummy", action="store_true", help="random base weights and adapters")
    parser.add_argument("--num-replicas", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the setting's")
    parser.add_argument("--num-ingress-replicas", type=int, default=1)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)
    if args.num_adapter < 0:
        parser.error(f"--num-adapter is {args.num_adapter}; it must be 0 or more")
    if not args.dummy and not SETTINGS[args.model_setting].has_weights:
        parser.error(f"{args.model_setting} has no real weights here; add --dummy")
    return args


def server_args(args: argparse.Namespace, scratch: Path) -> SLoRAArgs:
    """Write the setting's model and adapters into `scratch`; the arguments that serve them.

    Raises:
        pydantic.ValidationError: a value that the application does not take.
    """
    setting = SETTINGS[args.model_setting]
    sources = SHIPPED_ADAPTERS
    changes: dict[str, Any] = {
        "served_model_name": setting.served_name(args.dummy),
        "adapters_dir": str(scratch / "adapters"),
        "registry_state_path": str(scratch / "registry.json"),
        "packed_cache_dir": str(scratch / "packed"),
        "num_replicas": args.num_replicas,
        "num_ingress_replicas": args.num_ingress_replicas,
        **_device_args(args.device or setting.device),
    }
    if args.num_token is not None:
        changes["num_pool_tokens"] = args.num_token
    if args.dummy:
        model = make_dummy_model(setting.hf_config, scratch / "model")
        sources = scratch / "sources"
        changes |= {"model": str(model), "load_format": "dummy"}
        make_dummy_adapters(model, setting.ranks, setting.target_modules, sources)
    (scratch / "adapters").mkdir()
    number_adapters(adapter_dirs(sources), args.num_adapter, scratch / "adapters")
    app_args = config_args(**changes)
    needed = _packed_bytes(adapter_dirs(sources), args.num_adapter, app_args)
    return app_args.model_copy(update={"store_capacity_bytes": _store_bytes(needed, app_args)})


def _device_args(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"device": device}
    # Large extents are registered with CUDA at some 1.5 GiB a second.
    return {"device": device, "gpus_per_replica": 1.0, "store_extent_bytes": 2**30}


def _packed_bytes(sources: list[Path], num_adapters: int, args: SLoRAArgs) -> int:
    """Bytes of all numbered copies in page order."""
    from app.models.geometry import adapter_geometry
    from slora_core.adapters.peft_weights import inspect_peft_adapter

    geometry = adapter_geometry(args)
    sizes = [inspect_peft_adapter(source, geometry).nbytes for source in sources]
    return sum(sizes[index % len(sizes)] for index in range(num_adapters))


def _store_bytes(needed: int, args: SLoRAArgs) -> int:
    """Room in the host store for all adapters, as S-LoRA keeps them, if the memory allows it."""
    # A page-aligned range is rounded up, and does not straddle two extents.
    extent = args.store_extent_bytes
    wanted = max(args.store_capacity_bytes, -(-needed * 11 // 10 // extent) * extent + extent)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = max(args.store_capacity_bytes, int(free * MAX_STORE_SHARE))
    if wanted > allowed:
        say(f"the store keeps {allowed / 2**30:.1f} of {needed / 2**30:.1f} GiB of adapters")
    return min(wanted, allowed)


def main() -> None:
    args = parse_args()
    stop_on_signals()
    with tempfile.TemporaryDirectory(prefix="slora-bench-") as scratch:
        say(f"making {args.num_adapter} adapters of setting {args.model_setting}")
        try:
            serve_until_stopped(server_args(args, Path(scratch)), args.port)
        except (ServerError, SLoRAError, DemoModelError, ValueError) as error:
            sys.exit(f"the server did not start: {error}")
        except KeyboardInterrupt:
            sys.exit("stopped before it served")


if __name__ == "__main__":
    main()
