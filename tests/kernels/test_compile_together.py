"""Launches are held back inside `compile_together` alone; `test_compile_for_gpu` compiles by it."""

import pytest
from triton import knobs

from kernels.compile_together import compile_together


def test_launches_run_again_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="in a step"), compile_together():
        assert knobs.runtime.jit_cache_hook is not None
        raise RuntimeError("in a step")
    assert knobs.runtime.jit_cache_hook is None
