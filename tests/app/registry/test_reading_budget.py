"""How much is read at once, by counts of what is in work and not by time."""

import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from app.registry import inspector
from app.registry.inspector import AdapterInspector, Inspection
from app.registry.reading_budget import ReadingBudget
from slora_core.adapters import peft_weights
from slora_core.adapters.peft_weights import WEIGHTS_FILE
from slora_core.errors import InvalidAdapterError
from tests.factories import make_geometry, make_model, make_random_adapter

TIMEOUT_S = 30


def test_one_that_is_larger_than_all_goes_alone() -> None:
    budget = ReadingBudget(10)
    with ThreadPoolExecutor(1) as pool:
        with budget.taken(11):
            small = pool.submit(_take, budget, 1)
            assert not wait({small}, timeout=0.05).done
        small.result(TIMEOUT_S)


def test_a_piece_that_fails_gives_its_bytes_back() -> None:
    budget = ReadingBudget(10)
    with pytest.raises(InvalidAdapterError), budget.taken(10):
        raise InvalidAdapterError("damaged")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_take, budget, 10).result(TIMEOUT_S)


def test_pieces_of_any_sizes_never_take_more_than_there_is() -> None:
    budget, lock, in_work, most = ReadingBudget(10), threading.Lock(), [0], [0]

    def work(nbytes: int) -> None:
        with budget.taken(nbytes):
            with lock:
                in_work[0] += nbytes
                most[0] = max(most[0], in_work[0])
            with lock:
                in_work[0] -= nbytes

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [1 + number % 10 for number in range(2000)], timeout=TIMEOUT_S))
    assert in_work == [0] and most[0] <= 10


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
    monkeypatch.setattr(inspector, "_give_memory_back", lambda: given_back.append(True))
    checker = AdapterInspector(make_geometry(model), [tmp_path])
    for least, expected in ((weights.stat().st_size + 1, []), (weights.stat().st_size, [True])):
        monkeypatch.setattr(inspector, "LARGE_FILE_BYTES", least)
        [found] = checker.inspect_all([("a", folder)])
        assert isinstance(found, InvalidAdapterError) == is_damaged
        assert given_back == expected


def _take(budget: ReadingBudget, nbytes: int) -> None:
    with budget.taken(nbytes):
        pass
