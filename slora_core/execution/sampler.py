"""Chooses the next token of each row that samples.

A row's result depends on its logits, settings, seed and token index only, never on its batch.
"""

from dataclasses import dataclass
from typing import Self

import torch

from slora_core.execution.step_inputs import MaskedTokens, SamplingInputs

# SplitMix64 (Steele, Lea, Flood, 2014), its constants as signed 64-bit integers.
_GAMMA = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling settings of the rows that sample, not all of them greedy, on the device."""

    # float32 [R]; 0 is greedy.
    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    # int64 [R]; top_k 0 keeps all.
    top_k: torch.Tensor
    seed: torch.Tensor
    # Index of the sampled token in its request's output.
    token_index: torch.Tensor
    # int64 [F]: rows that sample and whose top_k, top_p or min_p cuts something.
    filtered_rows: torch.Tensor

    @classmethod
    def of(cls, inputs: SamplingInputs, device: torch.device) -> Self:
        return cls(
            temperature=_send(inputs.temperature, torch.float32, device),
            top_p=_send(inputs.top_p, torch.float32, device),
            min_p=_send(inputs.min_p, torch.float32, device),
            top_k=_send(inputs.top_k, torch.int64, device),
            seed=_send(inputs.seed, torch.int64, device),
            token_index=_send(inputs.token_index, torch.int64, device),
            filtered_rows=_send(inputs.filtered_rows, torch.int64, device),
        )


def mask_tokens(logits: torch.Tensor, masked: MaskedTokens) -> None:
    """logits[masked.rows[i], masked.token_ids[i]] = -inf, in place; logits [rows, vocab_size]."""
    rows = _send(masked.rows, torch.int64, logits.device)
    token_ids = _send(masked.token_ids, torch.int64, logits.device)
    logits.index_put_((rows, token_ids), logits.new_full((), float("-inf")))


def sample(logits: torch.Tensor, sampling: SamplingBatch | None) -> torch.Tensor:
    """Next token ids int64 [rows] of logits fp32 [rows, vocab_size].

    `sampling` None takes the most probable token of every row, as temperature 0
    takes the most probable token. Otherwise probabilities softmax(logits /
    temperature) are cut by top_k, then top_p (of what top_k left), then min_p, as in
    transformers, and the token is the first of the vocabulary at which the cumulative
    probability passes the row's random number.
    """
    greedy = logits.argmax(dim=-1)
    if sampling is None:
        return greedy
    temperature = sampling.temperature.clamp(min=1e-6).unsqueeze(1)
    probs = torch.softmax(logits / temperature, dim=-1)
    if len(sampling.filtered_rows):
        _filter(probs, sampling)
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:]
    threshold = uniform(sampling.seed, sampling.token_index).unsqueeze(1) * total
    # Tokens of probability 0 add nothing and are never the first to pass. Where rounding brings
    # the threshold up to the total, the last token that adds something is taken. Where logits
    # overflowed to NaN no comparison holds; such a row gets token 0, and harms no other.
    passed = torch.minimum((cumulative <= threshold).sum(dim=-1), (cumulative < total).sum(dim=-1))
    return torch.where(sampling.temperature == 0, greedy, passed)


def uniform(seed: torch.Tensor, token_index: torch.Tensor) -> torch.Tensor:
    """Random numbers fp32 in [0, 1), one for each pair of int64 (seed, token index)."""
    state = _mix(seed) + token_index * _GAMMA
    # The top 24 bits: what an fp32 holds exactly.
    return _shift_right(_mix(state), 40).float() / 2**24


def _send(
    values: list[int] | list[float], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    on_host = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        return on_host.pin_memory().to(device, non_blocking=True)
    return on_host


def _filter(probs: torch.Tensor, sampling: SamplingBatch) -> None:
    """Zero what top_k, top_p and min_p cut from `filtered_rows` of `probs`, in place.

    Only these rows are sorted: sorting a vocabulary costs more than all the rest.
    """
    rows = sampling.filtered_rows
    # Stable, so that the order of ties does not depend on the batch.
    ranked, order = probs[rows].sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(ranked.shape[1], device=probs.device)
    top_k = sampling.top_k[rows].unsqueeze(1)
    keep = (top_k == 0) | (ranks < top_k)
    left = torch.where(keep, ranked, 0.0)
    cumulative = left.cumsum(dim=-1)
    top_p = sampling.top_p[rows].unsqueeze(1)
    # At 1 nothing is cut, though rounding may bring the sum to its end early.
    keep &= (cumulative - left < top_p * cumulative[:, -1:]) | (top_p >= 1.0)
    keep &= ranked >= sampling.min_p[rows].unsqueeze(1) * ranked[:, :1]
    keep[:, 0] = True
    probs[rows] = torch.zeros_like(ranked).scatter_(1, order, torch.where(keep, ranked, 0.0))


def _mix(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer on int64, multiplication wrapping."""
    z = z + _GAMMA
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 taken as unsigned."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
