"""Every kernel compiles for an H100, whatever machine the tests run on."""

from collections import Counter
from pathlib import Path

from tests.absent_gpu import run_program


def test_every_kernel_compiles(tmp_path: Path) -> None:
    # Those of LoRA by rows of a tile and ranks; shrinks of 16 and of 64 ranks are one in decodes.
    assert Counter(run_program("tests.kernels.compile_for_gpu", tmp_path)) == {
        "_combine_kernel": 1,
        "_decode_kernel": 1,
        "_expand_kernel": 4,
        "_lora_silu_mul_kernel": 4,
        "_norm_kernel": 2,
        "_prefill_kernel": 1,
        "_rotary_kv_write_kernel": 1,
        "_shrink_kernel": 3,
        "_silu_mul_kernel": 1,
    }
