"""What threads have freed goes back to the system."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif("glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="needs glibc")
def test_what_threads_have_freed_goes_back():
    """Every tenth piece stays, so that no heap can shrink by itself; one thread frees 27 MiB."""
    program = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from pathlib import Path\n"
        "from app.heap import give_memory_back\n"
        "def anonymous():\n"
        "    status = Path('/proc/self/status').read_text().splitlines()\n"
        "    [line] = [line for line in status if line.startswith('RssAnon')]\n"
        "    return int(line.split()[1]) / 1024\n"
        "def work(_):\n"
        "    return [bytes(60_000) for _ in range(500)][::10]\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    kept = list(pool.map(work, range(4)))\n"
        "before = anonymous()\n"
        "give_memory_back()\n"
        "print(before - anonymous())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) > 20
