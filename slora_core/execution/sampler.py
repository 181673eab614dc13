"""Chooses the next token of each row that samples.

A row's result depends on its logits, settings, seed and token index only, never on its batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from slora_core.execution.step_inputs import MaskedTokens, SamplingInputs

# SplitMix64 (Steele, Lea, Flood, 2014), its constants as signed 64-bit integers.
_GAMMA = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15

# Rows whose probabilities are held at one time. They take up to 16 times the memory of the logits
# while they are sorted: 256 rows of a vocabulary of 128k would take 2 GB.
BLOCK_ROWS = 64


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
    # Of each block of `BLOCK_ROWS` rows, int64 [F]: which of its rows top_k, top_p or min_p cuts.
    filtered_rows: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, inputs: SamplingInputs, device: torch.device) -> Self:
        return cls(
            temperature=_send(inputs.temperature, torch.float32, device),
            top_p=_send(inputs.top_p, torch.float32, device),
            min_p=_send(inputs.min_p, torch.float32, device),
            top_k=_send(inputs.top_k, torch.int64, device),
            seed=_send(inputs.seed, torch.int64, device),
            token_index=_send(inputs.token_index, torch.int64, device),
            filtered_rows=tuple(
                _send(rows, torch.int64, device)
                for rows in rows_by_block(inputs.filtered_rows, len(inputs.seed))
            ),
        )


def rows_by_block(rows: Sequence[int], num_rows: int) -> list[list[int]]:
    """Of `num_rows` rows those in `rows`, by blocks, each counted from its block's first row."""
    return [
        [row - start for row in rows if start <= row < start + BLOCK_ROWS]
        for start in range(0, num_rows, BLOCK_ROWS)
    ]


def mask_tokens(logits: torch.Tensor, masked: MaskedTokens) -> None:
    """logits[masked.rows[i], masked.token_ids[i]] = -inf, in place; logits [rows, vocab_size]."""
    rows = _send(masked.rows, torch.int64, logits.device)
    token_ids = _send(masked.token_ids, torch.int64, logits.device)
    logits.index_put_((rows, token_ids), logits.new_full((), float("-inf")))


def sample(logits: torch.Tensor, sampling: SamplingBatch | None) -> torch.Tensor:
    """Next token ids int64 [rows] of logits fp32 [rows, vocab_size].

    Rows that are not greedy are taken `BLOCK_ROWS` at a time, which bounds the memory for their
    probabilities whatever the batch.

    `sampling` None takes the most probable token of every row, as temperature 0
    takes the most probable token. Otherwise probabilities softmax(logits /
    temperature) are cut by top_k, then top_p (of what top_k left), then min_p, as in
    transformers, and the token is the first of the vocabulary at which the cumulative
    probability passes the row's random number.
    """
    greedy = logits.argmax(dim=-1)
    if sampling is None:
        return greedy
    random = uniform(sampling.seed, sampling.token_index).unsqueeze(1)
    drawn = []
    for index, filtered_rows in enumerate(sampling.filtered_rows):
        block = slice(index * BLOCK_ROWS, (index + 1) * BLOCK_ROWS)
        # Not in a variable, which would outlive its block.
        drawn.append(
            _draw(_probabilities(logits[block], sampling, block, filtered_rows), random[block])
        )
    return torch.where(sampling.temperature == 0, greedy, torch.cat(drawn))


def _probabilities(
    logits: torch.Tensor, sampling: SamplingBatch, block: slice, filtered_rows: torch.Tensor
) -> torch.Tensor:
    """Of a block's rows, 0 for what is cut; greedy rows as at a temperature of nearly 0."""
    temperature = sampling.temperature[block].clamp(min=1e-6).unsqueeze(1)
    probs = torch.softmax(logits / temperature, dim=-1)
    if len(filtered_rows):
        _filter(
            probs,
            filtered_rows,
            sampling.top_k[block],
            sampling.top_p[block],
            sampling.min_p[block],
        )
    return probs


def _draw(probs: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """The first token of each row at which the cumulative probability passes `random` [rows, 1]."""
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:]
    threshold = random * total
    # Tokens of probability 0 add nothing and are never the first to pass. Where rounding brings
    # the threshold up to the total, the last token that adds something is taken. Where logits
    # overflowed to NaN no comparison holds; such a row gets token 0, and harms no other.
    return torch.minimum((cumulative <= threshold).sum(dim=-1), (cumulative < total).sum(dim=-1))


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


def _filter(
    probs: torch.Tensor,
    rows: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> None:
    """Zero what top_k, top_p and min_p cut from the `rows` of `probs`, in place.

    Only these rows are sorted: sorting a vocabulary costs more than all the rest.
    """
    # Stable, so that the order of ties does not depend on the batch.
    ranked, order = probs[rows].sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(ranked.shape[1], device=probs.device)
    top_k = top_k[rows].unsqueeze(1)
    keep = (top_k == 0) | (ranks < top_k)
    left = torch.where(keep, ranked, 0.0)
    cumulative = left.cumsum(dim=-1)
    top_p = top_p[rows].unsqueeze(1)
    # At 1 nothing is cut, though rounding may bring the sum to its end early.
    keep &= (cumulative - left < top_p * cumulative[:, -1:]) | (top_p >= 1.0)
    keep &= ranked >= min_p[rows].unsqueeze(1) * ranked[:, :1]
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
