"""Serves serve_configs/slora.yaml as it is, on a port of choice, until Ctrl-C.

`python launch_server.py`, from this folder; `run_exp.py` beside it checks the answers.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The packages, from wherever this is called.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse

from app.models.demo import DemoModelError
from benchmarks.serving.local_server import (
    ServerError,
    config_args,
    serve_until_stopped,
    stop_on_signals,
)
from slora_core.errors import SLoRAError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-replicas", type=int, default=1)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    stop_on_signals()
    try:
        serve_until_stopped(config_args(num_replicas=options.num_replicas), options.port)
    except (ServerError, SLoRAError, DemoModelError, ValueError) as error:
        sys.exit(f"the server did not start: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped before it served")


if __name__ == "__main__":
    main()
