"""What is relied on of Triton's unpromised parts holds for the version that is installed."""

from pathlib import Path

from tests.absent_gpu import run_program
from tests.kernels.triton_contract import CHECKS


def test_triton_has_what_is_relied_on(tmp_path: Path) -> None:
    names = run_program("tests.kernels.triton_contract", tmp_path)
    assert names == [check.__name__ for check in CHECKS]
