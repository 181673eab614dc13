"""Loading an adapter copies whole pages where they were told to go, and fills its slot only."""

import pytest
import torch

from slora_core.adapters.adapter_tables import AdapterTables
from slora_core.adapters.page_layout import (
    LoraWeights,
    PackedAdapter,
    pack_adapter,
    plan_layout,
)
from tests.factories import ALL_MODULES, uniform_geometry

NUM_LAYERS, PAGE_ELEMS = 2, 128
DIMS = dict.fromkeys(ALL_MODULES, (64, 128))


def _adapter(rank: int, seed: int = 0) -> PackedAdapter:
    geometry = uniform_geometry(NUM_LAYERS, PAGE_ELEMS, DIMS)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        (layer, module): LoraWeights(
            torch.randn(rank, 64, generator=generator),
            torch.randn(128, rank, generator=generator),
            scaling=0.5 + layer + module,
        )
        for layer in range(NUM_LAYERS)
        for module in (0, 2)
    }
    layout = plan_layout(
        geometry,
        {key: lora.rank for key, lora in weights.items()},
        {key: lora.scaling for key, lora in weights.items()},
    )
    return PackedAdapter(f"{rank}-{seed}", layout, pack_adapter(geometry, layout, weights))


@pytest.mark.parametrize(
    "page_ids",
    [[4, 5, 6, 7, 8, 9], [9, 8, 7, 3, 2, 1], [0, 1, 5, 6, 3, 11], [11, 0, 10, 1, 9, 2]],
)
def test_load_copies_pages_and_nothing_else(page_ids: list[int]) -> None:
    # Rank 2 on two modules: 2 x 2 x (64 + 128) = 768 elements, six pages.
    adapter = _adapter(2)
    pool = torch.full((12, NUM_LAYERS, PAGE_ELEMS), torch.nan)
    tables = AdapterTables(pool, len(DIMS), max_slots=3, max_pages=8)
    tables.load(1, adapter, page_ids)
    for index, page_id in enumerate(page_ids):
        assert torch.equal(pool[page_id], adapter.pages[index])
    others = [page_id for page_id in range(12) if page_id not in page_ids]
    assert pool[others].isnan().all()
    assert tables.page_tables[1, :6].tolist() == page_ids
    assert torch.equal(tables.offsets[1], adapter.layout.offsets)
    assert torch.equal(tables.scaling[1], adapter.layout.scaling)
    assert (adapter.layout.max_rank, adapter.layout.modules) == (2, {0, 2})
    assert not tables.offsets[[0, 2]].any() and not tables.scaling[[0, 2]].any()


def test_tables_stay_where_cuda_graphs_read_them() -> None:
    pool = torch.zeros(40, NUM_LAYERS, PAGE_ELEMS)
    tables = AdapterTables(pool, len(DIMS), max_slots=4, max_pages=24)
    tensors = (tables.page_tables, tables.offsets, tables.scaling)
    addresses = [tensor.data_ptr() for tensor in tensors]
    small, large = _adapter(1), _adapter(8)
    assert (small.layout.num_pages, large.layout.num_pages) == (3, 24)
    tables.load(0, small, [5, 6, 7])
    tables.load(2, large, list(range(10, 34)))
    tables.load(3, small, [1, 0, 2])
    assert tables.page_tables.dtype == torch.int32
    assert tables.page_tables[0, :3].tolist() == [5, 6, 7]
    assert tables.page_tables[2, :24].tolist() == list(range(10, 34))
    assert tables.page_tables[3, :3].tolist() == [1, 0, 2]
    tensors = (tables.page_tables, tables.offsets, tables.scaling)
    assert [tensor.data_ptr() for tensor in tensors] == addresses


def test_a_slot_is_taken_over_whole() -> None:
    pool = torch.zeros(40, NUM_LAYERS, PAGE_ELEMS)
    tables = AdapterTables(pool, len(DIMS), max_slots=1, max_pages=24)
    tables.load(0, _adapter(8), list(range(24)))
    small = _adapter(1, seed=1)
    tables.load(0, small, [30, 32, 31])
    assert torch.equal(tables.offsets[0], small.layout.offsets)
    assert tables.page_tables[0, :3].tolist() == [30, 32, 31]
    assert torch.equal(pool[[30, 32, 31]], small.pages)


def test_a_wrong_number_of_pages_is_a_defect() -> None:
    tables = AdapterTables(
        torch.zeros(8, NUM_LAYERS, PAGE_ELEMS), len(DIMS), max_slots=1, max_pages=8
    )
    with pytest.raises(AssertionError):
        tables.load(0, _adapter(1), [0, 1])
