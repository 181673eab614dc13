"""No request waits for a kernel to be compiled, whatever its length and its adapter."""

from pathlib import Path

from tests.absent_gpu import run_program


def test_requests_launch_what_the_warm_up_did(tmp_path: Path) -> None:
    words = run_program("tests.slora_core.execution.launch_keys", tmp_path)
    assert [word for word in words if not word.startswith("warm:")] == []
    # Of each of three engines.
    assert len(set(words)) == 9 and len(words) > 3 * 30
