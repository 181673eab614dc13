"""SiLU-mul of a projection to which adapters' deltas are still to be added."""

import torch

from kernels.lora_segments import LoraSegments
from kernels.torch_ops.lora_expand import lora_expand
from kernels.torch_ops.silu_mul import silu_mul


def lora_silu_mul(
    gate_up: torch.Tensor,
    v: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    modules: tuple[int, int],
    segments: LoraSegments,
) -> torch.Tensor:
    """`lora_expand` of [gate | up], then `silu_mul`.

    Args:
        gate_up: [rows, 2 * intermediate]; what it holds afterwards is not specified.
        v: what `lora_shrink` returned for the same modules and segments.
        modules: indices of the modules of gate and of up.
    """
    width = gate_up.shape[1] // 2
    lora_expand(gate_up, v, pool, layer, modules, (0, width, 2 * width), segments)
    return silu_mul(gate_up)
