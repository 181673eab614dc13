"""Fields keep their values and their places, whatever lies before them."""

import pytest
import torch

from slora_core.execution.int_fields import IntFields

CPU = torch.device("cpu")


def _fields(values: list[int]) -> IntFields:
    fields = IntFields()
    fields.add("first", values, size=5, fill=-1)
    fields.add("empty", [])
    fields.add("last", [7, 8])
    return fields


def test_fields_are_padded_and_aligned() -> None:
    views = _fields([3, 1]).to(CPU)
    assert {name: view.tolist() for name, view in views.items()} == {
        "first": [3, 1, -1, -1, -1],
        "empty": [],
        "last": [7, 8],
    }
    for view in views.values():
        assert view.dtype == torch.int32
        assert view.storage_offset() % 4 == 0


def test_steps_of_one_size_share_a_layout() -> None:
    """A graph's buffer is read through views made once and filled for each step."""
    empty, full = _fields([]), _fields([1, 2, 3, 4, 5])
    assert len(empty) == len(full)
    buffer = torch.full((len(empty) + 3,), 99, dtype=torch.int32)
    views = empty.views(buffer)
    full.copy_to(buffer)
    assert views["first"].tolist() == [1, 2, 3, 4, 5]
    assert views["last"].tolist() == [7, 8]
    assert buffer[-3:].tolist() == [99, 99, 99]


def test_a_step_writes_to_its_own_copy() -> None:
    fields = _fields([3, 1])
    for name, view in fields.to(CPU).items():
        assert fields.size(name) == len(view)
        view.fill_(99)
    assert fields.to(CPU)["first"].tolist() == [3, 1, -1, -1, -1]


def test_more_values_than_places_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="6 values and 5 places"):
        _fields([0] * 6)
