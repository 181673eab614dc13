"""Fixtures of the kernel tests."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.quick_interpreter import prepare_once_a_launch

    prepare_once_a_launch()


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch.empty give NaN, so that what an op forgets to write is seen."""
    empty = torch.empty

    def poisoned_empty(*args: object, **kwargs: object) -> torch.Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned_empty)
