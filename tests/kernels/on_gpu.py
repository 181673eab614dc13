"""Marks tests of kernels that need a GPU."""

from collections.abc import Callable

import pytest

from tests.kernels.cases import DEVICE


def gpu_test(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))
