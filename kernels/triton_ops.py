"""The ops of `torch_ops` by the same names and arguments, from Triton: the engine's on a GPU."""

from kernels.kv_write import rotary_kv_write
from kernels.lora_expand import lora_expand
from kernels.lora_shrink import lora_shrink
from kernels.lora_silu_mul import lora_silu_mul
from kernels.paged_decode import paged_decode
from kernels.paged_prefill import paged_prefill
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.silu_mul import silu_mul

__all__ = [
    "add_rms_norm",
    "lora_expand",
    "lora_shrink",
    "lora_silu_mul",
    "paged_decode",
    "paged_prefill",
    "rms_norm",
    "rotary_kv_write",
    "silu_mul",
]
