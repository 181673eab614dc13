"""What the ops compute, written as plainly as it can be: the oracle of all kernel tests.

Everything is dense and in fp64: it knows no pages, segments or tiles. `cases` makes the same
numbers dense and on pages. The oracles of `paged_decode` and `paged_prefill` are `attention`,
that of `rotary_kv_write` is `rotated`; others have the names of their ops.
"""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and the residual that it is of: rounded to its dtype before."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def rotated(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [rows, heads, head_dim]: its halves are the parts of complex numbers, which are turned."""
    turns = torch.complex(*cos_sin.double().chunk(2, dim=-1))[positions]
    turned = torch.complex(*x.double().chunk(2, dim=-1)) * turns.unsqueeze(1)
    return torch.cat((turned.real, turned.imag), -1)


def attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sm_scale: float
) -> torch.Tensor:
    """Of the last rows of a context, each of which sees all up to itself.

    q is [rows, num_heads, head_dim]; keys and values are [tokens, num_kv_heads, head_dim].
    """
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    positions = torch.arange(len(keys))
    is_hidden = positions > positions[len(keys) - len(q) :].unsqueeze(1)
    scores = sm_scale * torch.einsum("qhd,khd->hqk", q.double(), keys)
    shares = scores.masked_fill(is_hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", shares, values)


def lora_shrink(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Of rows of one adapter, or of one row; a is [rank, in_features]."""
    return x.double() @ a.double().T


def lora_expand(y: torch.Tensor, v: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Of rows of one adapter, or of one row; b is [out_features, rank]."""
    return y.double() + scaling * v.double() @ b.double().T


def lora_silu_mul(gate_up: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    """`deltas` are what `lora_expand` adds to gate_up."""
    return silu_mul(gate_up.double() + deltas)
