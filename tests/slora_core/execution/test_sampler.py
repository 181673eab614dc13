"""The sampler against a naive fp64 one, transformers' filters, and a plain-integer SplitMix64."""

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slora_core.execution.sampler import (
    BLOCK_ROWS,
    SamplingBatch,
    mask_tokens,
    rows_by_block,
    sample,
    uniform,
)
from slora_core.execution.step_inputs import MaskedTokens
from slora_core.requests import SamplingParams

VOCAB = 60
MASK = 2**64 - 1

# Settings that cut nothing, each filter alone, and all of them.
SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.6},
    {"top_p": 0.05},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.7},
    {"temperature": 1.7, "top_k": 25, "top_p": 0.9, "min_p": 0.08},
]


class SplitMix64:
    """The published generator (Steele, Lea, Flood, 2014) on Python integers."""

    def __init__(self, state: int) -> None:
        self.state = state & MASK

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)


def _uniform_by_integers(seed: int, token_index: int) -> float:
    """Output number `token_index` of the generator seeded by the first output of `seed`'s own."""
    generator = SplitMix64(SplitMix64(seed).next() + token_index * 0x9E3779B97F4A7C15)
    return (generator.next() >> 40) / 2**24


def _batch(params: list[SamplingParams], token_index: list[int] | None = None) -> SamplingBatch:
    def floats(name: str) -> torch.Tensor:
        return torch.tensor([getattr(p, name) for p in params], dtype=torch.float32)

    def ints(name: str) -> torch.Tensor:
        return torch.tensor([getattr(p, name) for p in params], dtype=torch.int64)

    return SamplingBatch(
        temperature=floats("temperature"),
        top_p=floats("top_p"),
        min_p=floats("min_p"),
        top_k=ints("top_k"),
        seed=ints("seed"),
        token_index=torch.tensor(token_index or [0] * len(params), dtype=torch.int64),
        filtered_rows=tuple(
            torch.tensor(rows, dtype=torch.int64)
            for rows in rows_by_block(
                [row for row, p in enumerate(params) if p.filtered], len(params)
            )
        ),
    )


def _logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def _naive_probabilities(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """Probability of each token after the filters, by loops over plain fp64 numbers."""
    scores = logits.double().numpy() / params.temperature
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    kept = list(np.argsort(-probs, kind="stable"))
    if params.top_k:
        kept = kept[: params.top_k]
    mass, total, nucleus = 0.0, probs[kept].sum(), []
    for token in kept:
        nucleus.append(token)
        mass += probs[token]
        if mass >= params.top_p * total:
            break
    kept = [token for token in nucleus if probs[token] >= params.min_p * probs.max()]
    result = np.zeros_like(probs)
    result[kept] = probs[kept] / probs[kept].sum()
    return result


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_probabilities_equal_transformers(settings: dict) -> None:
    """The naive oracle of the other tests means what `generate` means by the same settings."""
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    params = SamplingParams(**settings)
    logits = _logits(6, seed=3)
    scores = TemperatureLogitsWarper(params.temperature)(None, logits.double())
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    expected = torch.softmax(scores, -1).numpy()
    naive = np.stack([_naive_probabilities(row, params) for row in logits])
    np.testing.assert_allclose(naive, expected, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_token_is_where_the_cumulative_probability_passes_the_random_number(settings) -> None:
    rows = 300
    logits = _logits(rows, seed=1)
    params = [SamplingParams(**settings, seed=7 * row - 900) for row in range(rows)]
    index = [row % 11 for row in range(rows)]
    sampled = sample(logits, _batch(params, index)).tolist()
    close_calls = 0
    for row in range(rows):
        probs = _naive_probabilities(logits[row], params[row])
        cumulative = np.cumsum(probs)
        number = _uniform_by_integers(params[row].seed, index[row])
        if np.abs(cumulative - number).min() < 1e-5:
            close_calls += 1
            assert probs[sampled[row]] > 0
            continue
        assert sampled[row] == int((cumulative <= number).sum())
    assert close_calls < rows / 20


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_many_seeds_follow_the_probabilities(settings: dict) -> None:
    draws, logits = 20_000, _logits(1, seed=5, vocab=12)
    params = [SamplingParams(**settings, seed=seed) for seed in range(draws)]
    sampled = sample(logits.expand(draws, -1), _batch(params))
    counts = np.bincount(sampled.numpy(), minlength=12)
    expected = draws * _naive_probabilities(logits[0], params[0])
    assert (counts[expected == 0] == 0).all()
    likely = expected > 0
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    # The 99.9th percentile of chi-square with 11 degrees of freedom, the most there are.
    assert chi_square < 31.26


def test_many_token_indices_follow_the_probabilities() -> None:
    draws, logits = 20_000, _logits(1, seed=5, vocab=12)
    sampled = sample(
        logits.expand(draws, -1), _batch([SamplingParams(seed=5)] * draws, list(range(draws)))
    )
    counts = np.bincount(sampled.numpy(), minlength=12)
    expected = draws * _naive_probabilities(logits[0], SamplingParams())
    assert ((counts - expected) ** 2 / expected).sum() < 31.26


@pytest.mark.parametrize("vocab", [1, 60, 5000])
def test_a_row_does_not_depend_on_its_batch(vocab: int) -> None:
    rows = 36
    logits = _logits(rows, seed=2, vocab=vocab)
    # Ties, as low-precision logits have them.
    logits[::2] = logits[::2].round()
    params = [
        SamplingParams(**SETTINGS[row % len(SETTINGS)], seed=row) for row in range(rows - 3)
    ] + [SamplingParams(temperature=0.0, seed=row) for row in range(3)]
    index = list(range(rows))
    together = sample(logits, _batch(params, index)).tolist()
    alone = [
        sample(logits[row : row + 1], _batch([params[row]], [row])).item() for row in range(rows)
    ]
    assert together == alone
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sample(
        logits[order], _batch([params[row] for row in order], [index[row] for row in order])
    )
    assert shuffled.tolist() == [together[row] for row in order]


def test_greedy_takes_the_first_largest() -> None:
    logits = _logits(5)
    logits[2, [7, 3, 50]] = 99.0
    greedy = [SamplingParams(temperature=0.0, top_k=3, top_p=0.1, min_p=0.5)] * 5
    expected = [int(np.argmax(row.numpy())) for row in logits]
    assert expected[2] == 3
    assert sample(logits, _batch(greedy)).tolist() == expected
    assert sample(logits, None).tolist() == expected
    mixed = [*greedy[:4], SamplingParams(seed=1)]
    assert sample(logits, _batch(mixed)).tolist()[:4] == expected[:4]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-30},
        {"temperature": 1e-6},
        {"top_p": 1e-12},
        {"top_k": 1},
        {"min_p": 1.0},
        {"temperature": 100.0, "top_k": 1},
    ],
    ids=str,
)
def test_settings_that_leave_one_token(settings: dict) -> None:
    logits = _logits(40, seed=8)
    params = [SamplingParams(**settings, seed=seed) for seed in range(40)]
    assert sample(logits, _batch(params)).tolist() == logits.argmax(-1).tolist()


def test_min_p_of_one_keeps_every_most_probable_token() -> None:
    logits = _logits(1)
    logits[0, [3, 40]] = 9.0
    params = [SamplingParams(min_p=1.0, seed=seed) for seed in range(100)]
    assert set(sample(logits.expand(100, -1), _batch(params)).tolist()) == {3, 40}


def test_extreme_logits() -> None:
    logits = torch.full((3, 8), -torch.inf)
    logits[0, 5] = 0.0
    logits[1, [1, 6]] = 1e30
    logits[2] = 3.0
    params = [SamplingParams(seed=seed, temperature=1.0) for seed in range(3)]
    for index in range(30):
        first, second, third = sample(logits, _batch(params, [index] * 3)).tolist()
        assert first == 5
        assert second in (1, 6)
        assert 0 <= third < 8


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rows_of_nan_or_infinity_get_a_token_and_change_no_other(settings: dict) -> None:
    logits = _logits(4, seed=6)
    params = [SamplingParams(**settings, seed=seed) for seed in range(4)]
    expected = sample(logits, _batch(params)).tolist()
    logits[1] = torch.nan
    logits[2, 7] = torch.inf
    sampled = sample(logits, _batch(params)).tolist()
    assert [sampled[0], sampled[3]] == [expected[0], expected[3]]
    assert all(0 <= token < VOCAB for token in sampled)


def test_a_row_does_not_depend_on_its_block() -> None:
    num_rows = 2 * BLOCK_ROWS + 3
    logits = _logits(num_rows, seed=2)
    params = [SamplingParams(**SETTINGS[row % len(SETTINGS)], seed=row) for row in range(num_rows)]
    params[BLOCK_ROWS] = SamplingParams(temperature=0.0)
    together = sample(logits, _batch(params)).tolist()
    alone = [sample(logits[row : row + 1], _batch([params[row]])).item() for row in range(num_rows)]
    assert together == alone


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made under it, and no views of `known`, hold at one time."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.live: dict[int, int] = {known.untyped_storage()._cdata: 0}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, key, None)
        self.peak_bytes = max(self.peak_bytes, sum(self.live.values()))


def test_memory_does_not_grow_with_the_batch() -> None:
    """Beyond a block's, what a row takes is some numbers and no copy of its logits."""
    params = [SamplingParams(top_k=5, top_p=0.9, min_p=0.1, seed=row) for row in range(256)]
    peaks = {}
    for num_rows in (BLOCK_ROWS, 256):
        logits = _logits(num_rows, vocab=4096)
        batch = _batch(params[:num_rows])
        with PeakMemory(logits) as memory:
            sample(logits, batch)
        peaks[num_rows] = memory.peak_bytes
    assert peaks[BLOCK_ROWS] <= 16 * BLOCK_ROWS * 4096 * 4
    assert peaks[256] - peaks[BLOCK_ROWS] < 256 * 4096 * 4 / 10


def test_splitmix64_is_the_published_one() -> None:
    generator = SplitMix64(1234567)
    assert [generator.next() for _ in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_uniform_equals_integer_arithmetic() -> None:
    seeds = [0, 1, -1, 42, 2**31, 2**63 - 1, -(2**63), -(2**63) + 1, 0x0123456789ABCDEF]
    indices = [0, 1, 2, 1000, 2**31, 2**62]
    pairs = [(seed, index) for seed in seeds for index in indices]
    numbers = uniform(
        *(torch.tensor(column, dtype=torch.int64) for column in zip(*pairs, strict=True))
    )
    assert numbers.dtype == torch.float32
    assert numbers.tolist() == [_uniform_by_integers(*pair) for pair in pairs]


def test_uniform_is_uniform_and_below_one() -> None:
    seeds = torch.arange(100_000)
    for numbers in (
        uniform(seeds, torch.zeros_like(seeds)),
        uniform(torch.zeros_like(seeds), seeds),
    ):
        assert 0 <= numbers.min() < 1e-3 and 0.999 < numbers.max() < 1
        counts = torch.histc(numbers, bins=50, min=0, max=1)
        # The 99.9th percentile of chi-square with 49 degrees of freedom.
        assert ((counts - 2000) ** 2 / 2000).sum() < 85.4
    neighbours = torch.stack(
        (uniform(seeds, torch.zeros_like(seeds)), uniform(seeds + 1, seeds * 0))
    )
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 0.02


def test_masked_tokens_are_never_sampled() -> None:
    logits = torch.zeros(200, VOCAB)
    logits[:, 7] = 5.0
    kept = logits.clone()
    mask_tokens(logits, MaskedTokens([1, 1, 150], [7, 8, 9]))
    expected = kept.clone()
    expected[1, 7] = expected[1, 8] = expected[150, 9] = float("-inf")
    assert torch.equal(logits, expected)
    assert sample(logits, None).tolist() == [7, 0, *[7] * 198]
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(200)]
    sampled = sample(logits[1].expand(200, -1), _batch(params)).tolist()
    assert not {7, 8} & set(sampled) and len(set(sampled)) > 20
