"""What memory the checks of many adapters hold, by counts and not by time."""

import os
import threading
import weakref

import pytest

from app.registry import inspector
from app.registry.inspector import AdapterInspector, Inspection
from slora_core.adapters import peft_weights
from slora_core.adapters.peft_weights import WEIGHTS_FILE
from slora_core.errors import InvalidAdapterError
from tests.factories import make_geometry, make_model, make_random_adapter

TIMEOUT_S = 30


@pytest.mark.parametrize("num_fitting", [1, 2, 4])
def test_a_check_of_many_adapters_holds_few_of_them(tmp_path, monkeypatch, num_fitting) -> None:
    """As many as fit are checked side by side, however many cores there are."""
    model = make_model(tmp_path / "model", "llama")
    folders = [make_random_adapter(tmp_path / f"a{n}", model, seed=n) for n in range(8)]
    nbytes = (folders[0] / WEIGHTS_FILE).stat().st_size
    monkeypatch.setattr(inspector, "MAX_READING_BYTES", num_fitting * nbytes + nbytes // 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    # Each waits for as many as fit, and so they must be let in together.
    together = threading.Barrier(num_fitting, timeout=TIMEOUT_S)
    lock, in_work, most = threading.Lock(), [0], [0]
    inspect = AdapterInspector._inspect

    def counted(self, *args):
        with lock:
            in_work[0] += 1
            most[0] = max(most[0], in_work[0])
        together.wait()
        found = inspect(self, *args)
        with lock:
            in_work[0] -= 1
        return found

    monkeypatch.setattr(AdapterInspector, "_inspect", counted)
    checker = AdapterInspector(make_geometry(model), [tmp_path])
    found = list(checker.inspect_all([(folder.name, folder) for folder in folders]))
    assert all(isinstance(result, Inspection) for result in found)
    assert most == [num_fitting]


def test_refused_adapters_are_not_held_by_their_errors(tmp_path, monkeypatch) -> None:
    model = make_model(tmp_path / "model", "llama")
    folders = [
        make_random_adapter(tmp_path / f"a{n}", model, seed=n, scale=float("nan")) for n in range(3)
    ]
    held = []
    parse = peft_weights._parse_safetensors

    def remembered(data):
        tensors = parse(data)
        held.extend(weakref.ref(tensor) for tensor in tensors.values())
        return tensors

    monkeypatch.setattr(peft_weights, "_parse_safetensors", remembered)
    checker = AdapterInspector(make_geometry(model), [tmp_path])
    found = list(checker.inspect_all([(folder.name, folder) for folder in folders]))
    assert [type(result) for result in found] == [InvalidAdapterError] * 3
    assert all("holds NaN or infinity" in str(result) for result in found)
    assert held and not any(tensor() is not None for tensor in held)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_memory_of_large_files_is_given_back(tmp_path, monkeypatch, is_damaged) -> None:
    model = make_model(tmp_path / "model", "llama")
    folder = make_random_adapter(tmp_path / "a", model)
    weights = folder / WEIGHTS_FILE
    if is_damaged:
        weights.write_bytes(weights.read_bytes()[:-1])
    given_back = []
    monkeypatch.setattr(inspector, "give_memory_back", lambda: given_back.append(True))
    checker = AdapterInspector(make_geometry(model), [tmp_path])
    for least, expected in ((weights.stat().st_size + 1, []), (weights.stat().st_size, [True])):
        monkeypatch.setattr(inspector, "LARGE_FILE_BYTES", least)
        [found] = checker.inspect_all([("a", folder)])
        assert isinstance(found, InvalidAdapterError) == is_damaged
        assert given_back == expected
