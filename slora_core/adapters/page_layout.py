"""Where an adapter's weights lie in pages, and the packing of weights into page order.

Owns the page-stream format of the unified pool. It knows no files (`peft_weights` reads them) and
no device (`adapter_tables` copies whole pages). In each layer the stream holds, for each module of
the model that is present, A as `rank` rows of in_features and then B transposed as `rank`
rows of out_features, every row padded to `ROW_ALIGNMENT` elements. Element `o` of layer `l` lies
at `pages[o // page_elems, l, o % page_elems]`, so one table of page ids serves every layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kernels.row_alignment import row_elems
from slora_core.config import MAX_RANK, EngineConfig
from slora_core.dtypes import torch_dtype
from slora_core.models.config import ModelConfig, ModuleDims

# (layer, index in the geometry's modules)
ModuleKey = tuple[int, int]


@dataclass(frozen=True)
class LoraWeights:
    """One module's adapter: A [rank, in_features], B [out_features, rank], scaling = alpha / r."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterGeometry:
    """What the packed form depends on beside the adapter itself; equal geometries share packs."""

    page_elems: int
    # The base model's LoRA modules, as their names end in each layer: "self_attn.q_proj".
    modules: tuple[str, ...]
    # Of each layer and module; None where the layer has no such module.
    module_dims: tuple[tuple[ModuleDims | None, ...], ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: ModelConfig, engine: EngineConfig) -> "AdapterGeometry":
        return cls(
            page_elems=engine.page_elems(model),
            modules=tuple(projection.path for projection in model.names.projections),
            module_dims=model.module_dims,
            dtype=torch_dtype(engine.dtype),
        )

    @property
    def num_layers(self) -> int:
        return len(self.module_dims)

    @property
    def module_names(self) -> tuple[str, ...]:
        """Of the modules, as `target_modules` has them: "q_proj"."""
        return tuple(path.rpartition(".")[2] for path in self.modules)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return self.num_layers * self.page_elems * self.dtype.itemsize


@dataclass(frozen=True)
class AdapterLayout:
    """Descriptor of one packed adapter.

    `offsets` int32 [num_layers, num_modules, 3]: rank, offset of A, offset of B, offsets in
    elements of the layer's stream; rank 0 means that the adapter has no weights there.
    `scaling` float32 [num_layers, num_modules].
    """

    num_pages: int
    max_rank: int
    offsets: torch.Tensor
    scaling: torch.Tensor

    @property
    def modules(self) -> frozenset[int]:
        """Indices of the modules that it has weights for in some layer."""
        present = self.offsets[:, :, 0].any(dim=0)
        return frozenset(index for index, has in enumerate(present.tolist()) if has)


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter in page order in host memory: `pages` [num_pages, num_layers, page_elems]."""

    adapter_id: str
    layout: AdapterLayout
    pages: torch.Tensor


def max_adapter_pages(geometry: AdapterGeometry) -> int:
    """Pages of an adapter of `MAX_RANK` on every module: no adapter has more."""
    widest = max(
        sum(row_elems(fan_in) + row_elems(fan_out) for fan_in, fan_out in filter(None, dims))
        for dims in geometry.module_dims
    )
    return -(-MAX_RANK * widest // geometry.page_elems)


def plan_layout(
    geometry: AdapterGeometry, ranks: Mapping[ModuleKey, int], scaling: Mapping[ModuleKey, float]
) -> AdapterLayout:
    """Lay out the streams of an adapter; needs ranks and scalings only, no weights."""
    # Filled as lists: a tensor for each module would cost more than all the rest.
    offsets = [[[0, 0, 0] for _ in geometry.modules] for _ in geometry.module_dims]
    scales = [[0.0] * len(geometry.modules) for _ in geometry.module_dims]
    longest = 0
    for layer, layer_dims in enumerate(geometry.module_dims):
        end = 0
        for module, dims in enumerate(layer_dims):
            rank = ranks.get((layer, module), 0)
            if rank == 0:
                continue
            assert dims is not None, f"layer {layer} has no {geometry.modules[module]}"
            in_features, out_features = dims
            offset_b = end + rank * row_elems(in_features)
            offsets[layer][module] = [rank, end, offset_b]
            scales[layer][module] = scaling[layer, module]
            end = offset_b + rank * row_elems(out_features)
        longest = max(longest, end)
    return AdapterLayout(
        num_pages=-(-longest // geometry.page_elems),
        max_rank=max(ranks.values(), default=0),
        offsets=torch.tensor(offsets, dtype=torch.int32),
        scaling=torch.tensor(scales, dtype=torch.float32),
    )


def pack_adapter(
    geometry: AdapterGeometry,
    layout: AdapterLayout,
    weights: Mapping[ModuleKey, LoraWeights],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write weights into page order, converted to the geometry's dtype.

    `out` [num_pages, num_layers, page_elems] is filled and returned; padding and the tail of the
    last page become zero. A new tensor is made where none is given.
    """
    shape = (layout.num_pages, geometry.num_layers, geometry.page_elems)
    pages = torch.empty(shape, dtype=geometry.dtype) if out is None else out
    assert pages.shape == shape, f"out is {tuple(pages.shape)}, the layout needs {shape}"
    stream = torch.empty(layout.num_pages * geometry.page_elems, dtype=geometry.dtype)
    for layer, layer_dims in enumerate(geometry.module_dims):
        stream.zero_()
        for module, dims in enumerate(layer_dims):
            rank, offset_a, offset_b = layout.offsets[layer, module].tolist()
            if rank == 0 or dims is None:
                continue
            in_features, out_features = dims
            lora = weights[layer, module]
            _rows(stream, offset_a, rank, in_features).copy_(lora.a)
            _rows(stream, offset_b, rank, out_features).copy_(lora.b.T)
        pages[:, layer] = stream.view(layout.num_pages, geometry.page_elems)
    return pages


def _rows(stream: torch.Tensor, offset: int, rank: int, features: int) -> torch.Tensor:
    """View of `rank` rows of `features` elements that start at `offset` of a layer's stream."""
    width = row_elems(features)
    return stream[offset : offset + rank * width].view(rank, width)[:, :features]
