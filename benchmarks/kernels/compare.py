"""How far two results are apart, by the norm of the difference."""

import torch


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """||actual - exact|| / ||exact||."""
    return float((actual - exact).norm() / exact.norm())


def assert_near(name: str, actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """Raises AssertionError with the figures where a kernel differs from its twin by more."""
    error = relative_error(actual.float(), expected.float())
    assert error < limit, f"{name} differs from its twin by {error:.2g} of its norm"
