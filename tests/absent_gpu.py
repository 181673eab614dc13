"""An H100 that is not there, for programs that see what Triton's compiler does without a device.

Triton's interpreter accepts what its compiler does not, and a process has one or the other: a test
runs such a program by `run_program`.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels import dependent_launch


class _AbsentDevice:
    """What Triton asks before a launch that is skipped."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend_gpu() -> None:
    """Before `kernels.triton_ops` is imported: launches on CPU tensors are compiled for an H100."""
    driver.set_active(_AbsentDevice())
    # Threads that compile take the device of the thread that started them.
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    dependent_launch.launch_options = lambda x: dependent_launch.DEPENDENT_OPTIONS


def run_program(module: str, directory: Path) -> list[str]:
    """The words that a module writes as a program; what it compiles goes to `directory`."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(directory)}
    result = subprocess.run(
        [sys.executable, "-m", module],
        env=env,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.split()
