"""Shared memory of a store, registered with CUDA by a reader and given back with its mapping."""

import ctypes
import gc
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from app.store.memory import HostStore
from slora_core.adapters.adapter_tables import AdapterTables
from slora_core.adapters.host_pinning import pin_in_background
from slora_core.adapters.page_layout import LoraWeights, pack_adapter, plan_layout
from slora_core.adapters.slab_format import AdapterLocation
from slora_core.adapters.slab_reader import SlabReader
from slora_core.execution.graphs import StepGraphs
from slora_core.execution.int_fields import IntFields
from slora_core.execution.step_inputs import StepShape
from tests.factories import uniform_geometry
from tests.on_gpu import needs_gpu

pytestmark = needs_gpu

DIMS = {"q_proj": (256, 256), "k_proj": (256, 128), "down_proj": (512, 256)}
GEOMETRY = uniform_geometry(2, 4096, DIMS)
RANK = 16


@pytest.fixture
def weights() -> dict[tuple[int, int], LoraWeights]:
    generator = torch.Generator().manual_seed(0)
    return {
        (layer, 0): LoraWeights(
            torch.randn(RANK, 256, generator=generator),
            torch.randn(256, RANK, generator=generator),
            2.0,
        )
        for layer in range(GEOMETRY.num_layers)
    }


@pytest.fixture
def location(weights: dict[tuple[int, int], LoraWeights]) -> Iterator[AdapterLocation]:
    store = HostStore(GEOMETRY, capacity_bytes=1 << 24, extent_bytes=1 << 22)
    layout = plan_layout(GEOMETRY, dict.fromkeys(weights, RANK), dict.fromkeys(weights, 2.0))
    store.put("a", layout, weights)
    yield store.lease("a", os.getpid())
    store.close()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def test_pages_are_copied_from_registered_memory(location, weights) -> None:
    reader = SlabReader(GEOMETRY, pin_in_background)
    adapter = reader.open(location)
    _until(adapter.pages.is_pinned)
    pool = torch.zeros(64, GEOMETRY.num_layers, GEOMETRY.page_elems, device="cuda")
    tables = AdapterTables(pool, len(DIMS), max_slots=2, max_pages=32)
    page_ids = [40 - 2 * page for page in range(adapter.layout.num_pages)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tables.load(1, adapter, page_ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = pack_adapter(GEOMETRY, adapter.layout, weights)
    assert torch.equal(pool[page_ids].cpu(), expected)
    assert tables.page_tables[1, : len(page_ids)].tolist() == page_ids


def test_the_registration_ends_with_the_mapping(location) -> None:
    for _ in range(3):
        reader = SlabReader(GEOMETRY, pin_in_background)
        pages = reader.open(location).pages
        _until(pages.is_pinned)
        reader.close()
        assert pages.is_pinned(), "a view keeps the mapping"
        del pages
        gc.collect()
        # Mapped anew, as a rule at the address that was just given back.
        assert not SlabReader(GEOMETRY).open(location).pages.is_pinned()


def test_memory_is_registered_during_a_capture() -> None:
    """A graph may be captured while another thread maps a slab."""
    graphs = StepGraphs(torch.device("cuda"))
    fields = IntFields()
    fields.add("values", [1, 2, 3])
    errors: list[int] = []

    def register() -> None:
        memory = mmap.mmap(-1, 1 << 20)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        cudart = torch.cuda.cudart()
        errors.append(int(cudart.cudaHostRegister(address, len(memory), 0)))
        errors.append(int(cudart.cudaHostUnregister(address)))

    result = torch.zeros(4, dtype=torch.int32, device="cuda")

    def forward(inputs: torch.Tensor, num_layers: int | None) -> None:
        if num_layers is None:
            thread = threading.Thread(target=register)
            thread.start()
            thread.join()
        result.copy_(inputs[: len(result)] * 2)

    shape = StepShape(num_rows=3, num_decodes=3, num_prefills=0, lora=None, is_padded=True)
    graphs.capture(shape, fields, forward)
    assert errors == [0, 0]
    graphs.replay(shape, fields)
    assert result[:3].tolist() == [2, 4, 6]
