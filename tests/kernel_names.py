"""The names of the Triton kernels that the host launches, for tests that none is left out."""

import re
from pathlib import Path

KERNELS_DIR = Path(__file__).parents[1] / "kernels"


def kernel_names() -> set[str]:
    """Read from the sources: importing the kernels would decide how this process runs them."""
    return {
        name
        for path in KERNELS_DIR.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
