"""The page-stream format: offsets, sizes, alignment, and packed weights read back by its rule."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.row_alignment import ROW_ALIGNMENT, row_elems
from slora_core.adapters.page_layout import (
    AdapterGeometry,
    LoraWeights,
    max_adapter_pages,
    pack_adapter,
    plan_layout,
)
from slora_core.config import EngineConfig
from slora_core.models.registry import load_model_config
from tests.factories import (
    ALL_MODULES,
    MODEL_FAMILIES,
    family_modules,
    make_geometry,
    make_model,
    uniform_geometry,
)

DIMS = ((64, 128), (64, 32), (64, 32), (128, 64), (64, 96), (64, 96), (96, 64))


def _geometry(page_elems: int = 256, num_layers: int = 2, dtype=torch.float32) -> AdapterGeometry:
    dims = dict(zip(ALL_MODULES, DIMS, strict=True))
    return uniform_geometry(num_layers, page_elems, dims, dtype)


def _weights(ranks: dict, seed: int = 0, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for (layer, module), rank in ranks.items():
        in_features, out_features = DIMS[module]
        found[layer, module] = LoraWeights(
            torch.randn(rank, in_features, generator=generator).to(dtype),
            torch.randn(out_features, rank, generator=generator).to(dtype),
            scaling=1.0 + layer + module,
        )
    return found


def _plan(geometry: AdapterGeometry, ranks: dict):
    return plan_layout(geometry, ranks, {key: 1.0 + sum(key) for key in ranks})


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_geometry_of_a_model(tmp_path: Path, family: str) -> None:
    model_dir = make_model(tmp_path, family)
    config = EngineConfig(page_tokens=8, dtype="bfloat16")
    geometry = AdapterGeometry.of(load_model_config(model_dir), config)
    assert geometry == make_geometry(model_dir, page_tokens=8, dtype=torch.bfloat16)
    assert geometry.module_names == family_modules(family)


def test_offsets_of_a_known_adapter() -> None:
    # Layer 0: q of rank 2, A 2 x 64 and B 2 x 128, then down of rank 1, A 128 (padded) and B 64.
    layout = _plan(_geometry(), {(0, 0): 2, (0, 6): 1, (1, 1): 3})
    assert layout.offsets[0, 0].tolist() == [2, 0, 128]
    assert layout.offsets[0, 6].tolist() == [1, 384, 512]
    assert layout.offsets[1, 1].tolist() == [3, 0, 192]
    present = {(0, 0), (0, 6), (1, 1)}
    for layer in range(2):
        for module in range(len(DIMS)):
            if (layer, module) not in present:
                assert layout.offsets[layer, module].tolist() == [0, 0, 0]
                assert layout.scaling[layer, module] == 0
            else:
                assert layout.scaling[layer, module] == 1 + layer + module
    # The longest layer ends at 576 elements: three pages of 256.
    assert layout.num_pages == 3
    assert layout.max_rank == 3


def test_page_count_at_the_border() -> None:
    assert _plan(_geometry(page_elems=192), {(0, 0): 1}).num_pages == 1
    assert _plan(_geometry(page_elems=128), {(0, 0): 1}).num_pages == 2


def test_layers_that_are_not_alike() -> None:
    """The second layer lacks q and is wider in down; streams of both lie in the same pages."""
    geometry = AdapterGeometry(
        page_elems=256,
        modules=("self_attn.q_proj", "mlp.down_proj"),
        module_dims=(((64, 128), (96, 64)), (None, (192, 64))),
        dtype=torch.float32,
    )
    assert geometry.num_layers == 2
    # 256 x (64 + 128 + 128 + 64) elements of the first layer, 256 x (192 + 64) of the second.
    assert max_adapter_pages(geometry) == 384
    ranks = {(0, 0): 1, (0, 1): 2, (1, 1): 2}
    layout = _plan(geometry, ranks)
    assert layout.offsets[:, 0].tolist() == [[1, 0, 64], [0, 0, 0]]
    assert layout.offsets[:, 1].tolist() == [[2, 192, 448], [2, 0, 384]]
    weights = {
        key: LoraWeights(torch.full((rank, fan_in), 1.0), torch.full((fan_out, rank), 2.0), 1.0)
        for key, rank in ranks.items()
        for fan_in, fan_out in [geometry.module_dims[key[0]][key[1]]]
    }
    pages = pack_adapter(geometry, layout, weights)
    assert pages.shape == (3, 2, 256)
    first, second = pages.transpose(0, 1).flatten(1)
    assert first[:192].tolist() == [1.0] * 64 + [2.0] * 128
    assert second.tolist() == [1.0] * 384 + [2.0] * 128 + [0.0] * 256
    with pytest.raises(AssertionError, match="layer 1 has no self_attn.q_proj"):
        _plan(geometry, {(1, 0): 1})


def test_page_bytes_covers_all_layers() -> None:
    assert _geometry(256, 3).page_bytes == 3 * 256 * 4
    assert _geometry(256, 3, torch.bfloat16).page_bytes == 3 * 256 * 2


ranks_of_modules = st.dictionaries(
    st.tuples(st.integers(0, 2), st.integers(0, len(DIMS) - 1)),
    st.integers(1, 9),
    min_size=1,
)


@settings(max_examples=60, deadline=None)
@given(ranks_of_modules, st.sampled_from([64, 192, 1024]), st.sampled_from(["float32", "float16"]))
def test_packed_weights_read_back_by_the_rule(ranks, page_elems: int, dtype_name: str) -> None:
    geometry = _geometry(page_elems, 3, getattr(torch, dtype_name))
    layout = _plan(geometry, ranks)
    weights = _weights(ranks)
    pages = pack_adapter(geometry, layout, weights)
    assert pages.shape == (layout.num_pages, 3, page_elems)
    assert pages.dtype == geometry.dtype

    # Element o of layer l lies at pages[o // page_elems, l, o % page_elems].
    unread = pages.clone()
    for (layer, module), lora in weights.items():
        rank, offset_a, offset_b = layout.offsets[layer, module].tolist()
        assert rank == lora.rank
        for offset, rows in ((offset_a, lora.a), (offset_b, lora.b.T)):
            assert offset % ROW_ALIGNMENT == 0
            width = row_elems(rows.shape[1])
            for index, row in enumerate(rows):
                place = offset + index * width + torch.arange(len(row))
                where = place // page_elems, layer, place % page_elems
                assert torch.equal(pages[where], row.to(geometry.dtype))
                # Not zero: nobody else has read these elements, so none overlap.
                assert unread[where].any()
                unread[where] = 0
    assert not unread.any(), "padding and tails are zero"


def test_pack_fills_what_it_is_given_and_converts() -> None:
    geometry = _geometry(dtype=torch.bfloat16)
    ranks = {(0, 0): 4, (1, 5): 2}
    layout = _plan(geometry, ranks)
    weights = _weights(ranks, dtype=torch.float64)
    out = torch.full((layout.num_pages, 2, 256), torch.nan, dtype=torch.bfloat16)
    packed = pack_adapter(geometry, layout, weights, out)
    assert packed is out
    assert torch.equal(out, pack_adapter(geometry, layout, weights))
    assert not out.isnan().any()


def test_pack_refuses_a_wrong_shape() -> None:
    geometry = _geometry()
    ranks = {(0, 0): 4}
    layout = _plan(geometry, ranks)
    with pytest.raises(AssertionError, match="the layout needs"):
        pack_adapter(geometry, layout, _weights(ranks), torch.zeros(1, 2, 256))
