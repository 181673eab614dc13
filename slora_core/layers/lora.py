"""Linears with heterogeneous LoRA on top: one base matmul, a shrink, and the deltas.

A linear serves a group of modules that share their input (q, k, v; gate, up) as one fused matrix.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import TypeGuard

import torch

from kernels.lora_segments import LoraSegments
from slora_core.layers.linear import Linear
from slora_core.models.config import ModelConfig


@dataclass(frozen=True)
class LoraGroup:
    """Modules of one linear: indices in the model's projections, and bounds of their outputs."""

    modules: tuple[int, ...]
    # len(modules) + 1 column bounds.
    out_offsets: tuple[int, ...]


def lora_groups(model: ModelConfig, layer: int) -> dict[str, LoraGroup]:
    """The group of each linear of a layer."""
    groups = {}
    for name, linear in model.layers[layer].linears.items():
        modules, bounds = [], [0]
        for index, projection in enumerate(model.names.projections):
            if projection.linear == name:
                modules.append(index)
                start, end = projection.rows(linear)
                assert start == bounds[-1], f"{projection.path} does not follow the one before"
                bounds.append(end)
        groups[name] = LoraGroup(tuple(modules), tuple(bounds))
    return groups


class LoraLinear:
    """y = linear(x), and each row's adapter delta on top.

    `ops` is the kernel module of the device.
    """

    def __init__(
        self,
        linear: Linear,
        ops: ModuleType,
        pool: torch.Tensor,
        layer: int,
        group: LoraGroup,
    ) -> None:
        assert group.out_offsets[-1] == linear.out_features, "the modules are all of the linear"
        self._linear = linear
        self._ops = ops
        self._pool = pool
        self._layer = layer
        self._group = group
        # The kernel that adds deltas inside SiLU-mul takes gate and up as a module each.
        self._is_one_module = len(group.modules) == 1

    def __call__(self, x: torch.Tensor, lora: LoraSegments | None) -> torch.Tensor:
        """[rows, in_features] to [rows, out_features]; `lora` None is the base model."""
        y = self._linear(x)
        if self._has_delta(lora):
            v = self._shrink(x, lora)
            group, args = self._group, (self._pool, self._layer)
            self._ops.lora_expand(y, v, *args, group.modules, group.out_offsets, lora)
        return y

    def silu_mul(self, x: torch.Tensor, lora: LoraSegments | None) -> torch.Tensor:
        """silu(gate) * up [rows, out_features / 2] of a linear whose output is [gate | up]."""
        if self._is_one_module:
            return self._ops.silu_mul(self(x, lora))
        y = self._linear(x)
        if not self._has_delta(lora):
            return self._ops.silu_mul(y)
        v = self._shrink(x, lora)
        return self._ops.lora_silu_mul(y, v, self._pool, self._layer, self._group.modules, lora)

    def _has_delta(self, lora: LoraSegments | None) -> TypeGuard[LoraSegments]:
        return lora is not None and not lora.modules.isdisjoint(self._group.modules)

    def _shrink(self, x: torch.Tensor, lora: LoraSegments) -> torch.Tensor:
        return self._ops.lora_shrink(x, self._pool, self._layer, self._group.modules, lora)
