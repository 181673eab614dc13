"""A benchmark's row: its figures and where they come from, as a line of JSON.

It knows no benchmark. Standard library only, so that it works wherever one runs, from a copy of
the files without their history too.
"""

import argparse
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "ray", "peft", "triton", "vllm")


def make_row(
    benchmark: str, figures: dict[str, Any], config: dict[str, Any], seed: int
) -> dict[str, Any]:
    """What a run gave, with all that is needed to run it again."""
    return {"benchmark": benchmark, **figures, "config": config, "seed": seed, **provenance()}


def add_output_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, help="file to which the row is added: benchmarks/results/NAME.jsonl"
    )


def publish(row: dict[str, Any], output: Path | None) -> None:
    """Print a row, the last line of a benchmark's stdout, and add it to its results if wanted."""
    line = json.dumps(row)
    print(line)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a") as file:
            file.write(line + "\n")


def provenance() -> dict[str, Any]:
    """Commit, versions and host of this process, without importing what it names.

    Without git's history the commit is what SLORA_COMMIT tells, and else None.
    """
    told = os.environ.get("SLORA_COMMIT")
    commit = told or _git("rev-parse", "--short=12", "HEAD")
    # Rows that earlier runs added change no figure.
    paths = ("--", ".", ":!benchmarks/results")
    changes = _git("status", "--porcelain", "--untracked-files=no", *paths)
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "commit": commit or None,
        # None: not known.
        "modified": bool(changes) if commit and not told else None,
        "versions": versions,
        "cpu": _cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "gpus": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines(),
    }


def _git(*arguments: str) -> str:
    return _output("git", "-C", str(ROOT), *arguments)


def _output(*command: str) -> str:
    """What a command prints; nothing where there is no such command or it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
