"""No request waits for a kernel to be compiled, whatever its length and its adapter."""

from pathlib import Path

from tests.absent_gpu import run_program
from tests.kernel_names import kernel_names
from tests.slora_core.execution.launch_keys import SETTINGS


def test_requests_launch_what_the_warm_up_did(tmp_path: Path) -> None:
    launches = run_program("tests.slora_core.execution.launch_keys", tmp_path)
    # Requests launch every kernel, and none before the warm-up.
    assert set(launches) == {
        f"{engine}:{who}:{name}"
        for engine in range(len(SETTINGS))
        for who in ("warm-up", "requests")
        for name in kernel_names()
    }
