"""What the tests of the elementwise ops share: both implementations, inputs, and graph replay."""

from collections.abc import Callable, Sequence

import pytest
import torch

from kernels import torch_ops, triton_ops
from tests.kernels.cases import DEVICE, DTYPES, bits

EVERY_OPS = pytest.mark.parametrize("ops", [torch_ops, triton_ops], ids=["twin", "triton"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
# In fp32 the last bits depend on the order of sums; in 16 bits the rounding steps show.
EVERY_16_BIT_DTYPE = pytest.mark.parametrize("dtype", DTYPES[1:])


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)


def assert_few_bits_differ(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for what another order of a sum, or another exp, rounds otherwise.

    A rounding step that is missing changes a quarter of the elements.
    """
    assert actual.dtype == expected.dtype
    assert (actual != expected).double().mean() < 0.01


def assert_replay_equals_eager(
    op: Callable[..., torch.Tensor | None], batches: Sequence[tuple[torch.Tensor, ...]]
) -> None:
    """Capture op(*batches[0]) and replay it with the contents of every batch, bit for bit."""
    static = [x.clone() for x in batches[0]]
    op(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = op(*static)
    for batch in batches:
        for x, content in zip(static, batch, strict=True):
            x.copy_(content)
        graph.replay()
        eager = [x.clone() for x in batch]
        result = op(*eager)
        for x, expected in zip([replayed, *static], [result, *eager], strict=True):
            if x is not None and expected is not None:
                assert torch.equal(bits(x), bits(expected))
