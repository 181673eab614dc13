"""Random adapters that are packed already, in host memory: no files are read.

Many adapters alias a few host copies; on the device each has pages of its own, so that nothing
gets faster by the aliasing.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.engine.workloads import AdapterSetting, adapter_id
from slora_core.adapters.page_layout import (
    AdapterGeometry,
    AdapterLayout,
    PackedAdapter,
    plan_layout,
)

# Standard deviation of random adapter weights.
ADAPTER_STD = 0.02


def uniform_layout(geometry: AdapterGeometry, modules: Sequence[str], rank: int) -> AdapterLayout:
    """Of an adapter with one rank and scaling 1 on these modules of every layer."""
    indices = [geometry.module_names.index(name) for name in modules]
    keys = [(layer, module) for layer in range(geometry.num_layers) for module in indices]
    return plan_layout(geometry, dict.fromkeys(keys, rank), dict.fromkeys(keys, 1.0))


class DummyAdapters:
    """Adapters `<name>-0`, `<name>-1` and so on, without end.

    Args:
        device: makes the weights; where it is CUDA, the host copies are pinned.
        num_copies: host copies, a multiple of the setting's ranks.
    """

    def __init__(
        self,
        name: str,
        geometry: AdapterGeometry,
        setting: AdapterSetting,
        device: torch.device,
        num_copies: int = 64,
        seed: int = 0,
    ) -> None:
        assert num_copies % len(setting.ranks) == 0, "an adapter's rank is that of its index"
        self._name = name
        self._geometry = geometry
        self._setting = setting
        generator = torch.Generator(device).manual_seed(seed)
        self._copies = [self._make(index, generator) for index in range(num_copies)]

    def __getitem__(self, index: int) -> PackedAdapter:
        copy = self._copies[index % len(self._copies)]
        return replace(copy, adapter_id=adapter_id(index, self._name))

    def _make(self, index: int, generator: torch.Generator) -> PackedAdapter:
        geometry, ranks = self._geometry, self._setting.ranks
        layout = uniform_layout(geometry, self._setting.modules, ranks[index % len(ranks)])
        shape = (layout.num_pages, geometry.num_layers, geometry.page_elems)
        pages = torch.empty(shape, dtype=geometry.dtype, device=generator.device)
        pages.normal_(0.0, ADAPTER_STD, generator=generator)
        host = torch.empty(shape, dtype=geometry.dtype, pin_memory=generator.device.type == "cuda")
        host.copy_(pages)
        return PackedAdapter(adapter_id(index, self._name), layout, host)
