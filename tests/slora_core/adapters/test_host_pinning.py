"""What CUDA is told of mapped memory, and when; `tests/gpu` has the registration itself."""

import gc
from pathlib import Path

import pytest
import torch

from slora_core.adapters import host_pinning
from slora_core.adapters.slab_reader import SlabMemory

NUM_BYTES = 1 << 20


class FakeCudart:
    """Notes what is registered and whether it is mapped at that time."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.calls: list[tuple[str, int, bool]] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert (nbytes, flags) == (NUM_BYTES, 0)
        self.calls.append(("register", address, _is_mapped(address)))
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address, _is_mapped(address)))
        return 0


def _is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def test_memory_is_unregistered_before_it_is_unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = FakeCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    memory = SlabMemory(-1, NUM_BYTES)
    view = torch.frombuffer(memory, dtype=torch.uint8)
    host_pinning._pin(memory)
    address = view.data_ptr()
    del memory
    gc.collect()
    assert cudart.calls == [("register", address, True)], "the view keeps the memory"
    del view
    gc.collect()
    assert cudart.calls[1:] == [("unregister", address, True)]
    assert not _is_mapped(address)


def test_memory_that_cannot_be_registered_is_used_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cudart = FakeCudart(error=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    memory = SlabMemory(-1, NUM_BYTES)
    host_pinning._pin(memory)
    assert "could not be registered with CUDA (error 2)" in caplog.text
    del memory
    gc.collect()
    assert [name for name, *_ in cudart.calls] == ["register"]
