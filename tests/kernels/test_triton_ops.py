"""The table of Triton ops offers what the twins do."""

import inspect

import pytest

from kernels import torch_ops, triton_ops


def test_every_op_has_a_kernel() -> None:
    assert triton_ops.__all__ == torch_ops.__all__


@pytest.mark.parametrize("name", triton_ops.__all__)
def test_arguments_are_the_twins(name: str) -> None:
    twin = inspect.signature(getattr(torch_ops, name)).parameters
    ours = inspect.signature(getattr(triton_ops, name)).parameters
    # Beyond them a kernel may take launch parameters, by keyword alone.
    positional = [n for n, p in ours.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == list(twin)
    assert all(p.default is None for n, p in ours.items() if n not in twin)
