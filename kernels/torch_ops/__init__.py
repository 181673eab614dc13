"""The ops in plain torch: what the engine computes with on a CPU.

They say what each op means; `triton_ops` has the same names and arguments, and every kernel of it
is tested against its twin here, which lies in the file of the same name. The engine takes either
module as its `ops`.

Ops over the unified pool take it whole, with a layer index: `pool` [num_pages, num_layers,
page_elems], or `kv_cache`, the same memory viewed as [num_pages, num_layers, 2 (K, V),
page_tokens, num_kv_heads, head_dim]. Activations are [rows, features], row-contiguous.
"""

from kernels.torch_ops.kv_write import rotary_kv_write
from kernels.torch_ops.lora_expand import lora_expand
from kernels.torch_ops.lora_shrink import lora_shrink
from kernels.torch_ops.lora_silu_mul import lora_silu_mul
from kernels.torch_ops.paged_decode import paged_decode
from kernels.torch_ops.paged_prefill import paged_prefill
from kernels.torch_ops.rms_norm import add_rms_norm, rms_norm
from kernels.torch_ops.silu_mul import silu_mul

# After the imports these names are the ops, not the submodules that some are called like.
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
