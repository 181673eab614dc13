"""LoRA over linears of any class; what the kernels compute is tested with them."""

import pytest
import torch
import torch.nn.functional as F

from kernels import torch_ops
from slora_core.layers.linear import DenseLinear
from slora_core.layers.lora import LoraGroup, LoraLinear
from tests.kernels.cases import assert_close, make_lora_case

ROWS = 6
IN, OUT = 64, 96


class RoundedLinear:
    """A linear of another class: its weight is kept in 8 bits, with a scale a row."""

    in_features, out_features = IN, OUT

    def __init__(self, weight: torch.Tensor) -> None:
        self._scale = weight.abs().amax(1, keepdim=True) / 127
        self._weight = (weight / self._scale).round().to(torch.int8)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight.float() * self._scale)

    def rows(self, start: int, end: int) -> dict[str, torch.Tensor]:
        return {"qweight": self._weight[start:end], "scales": self._scale[start:end]}


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _make(kind: type, parts: tuple[int, ...]):
    """A linear whose output is `parts` modules, with adapters on it, and its case."""
    case = make_lora_case(
        [(0, 2), (-1, 1), (1, 3)], [[4] * len(parts), [7] * len(parts)], [(IN, n) for n in parts]
    )
    bounds = tuple(sum(parts[:i]) for i in range(len(parts) + 1))
    group = LoraGroup(tuple(range(len(parts))), bounds)
    linear = kind(_randn(OUT, IN))
    return linear, LoraLinear(linear, torch_ops, case.pool, 1, group), case, bounds


@pytest.mark.parametrize("kind", [DenseLinear, RoundedLinear])
@pytest.mark.parametrize("parts", [(OUT,), (48, 48), (32, 16, 48)])
def test_deltas_are_added_to_any_linear(kind: type, parts: tuple[int, ...]) -> None:
    linear, lora_linear, case, bounds = _make(kind, parts)
    x = _randn(ROWS, IN, seed=1)
    base = linear(x)
    assert torch.equal(lora_linear(x, None), base)
    expected = base.double()
    for module, start in enumerate(bounds[:-1]):
        expected[:, start : bounds[module + 1]] += case.deltas(x, 1, module, parts[module])
    actual = lora_linear(x, case.segments)
    assert_close(actual, expected, torch.float32)
    # The third row is the base model's.
    assert torch.equal(actual[2], base[2])


@pytest.mark.parametrize("parts", [(OUT,), (OUT // 2, OUT // 2)])
def test_silu_mul_of_one_module_and_of_two(parts: tuple[int, ...]) -> None:
    _, lora_linear, case, _ = _make(DenseLinear, parts)
    x = _randn(ROWS, IN, seed=1)
    for lora in (None, case.segments):
        gate, up = lora_linear(x, lora).double().chunk(2, dim=-1)
        assert_close(lora_linear.silu_mul(x, lora), F.silu(gate) * up, torch.float32)


def test_a_group_must_cover_its_linear() -> None:
    with pytest.raises(AssertionError, match="the modules are all of the linear"):
        LoraLinear(
            DenseLinear(_randn(OUT, IN)), torch_ops, torch.empty(0), 0, LoraGroup((0,), (0, 64))
        )


def test_rows_of_a_dense_linear_are_views() -> None:
    linear = DenseLinear(_randn(OUT, IN), _randn(OUT, seed=1))
    assert (linear.in_features, linear.out_features) == (IN, OUT)
    rows = linear.rows(10, 30)
    assert rows.keys() == {"weight", "bias"}
    for view, whole in ((rows["weight"], linear.weight), (rows["bias"], linear.bias)):
        view.fill_(7.0)
        assert (whole[10:30] == 7).all() and not (whole[30:] == 7).any()
    assert DenseLinear(_randn(OUT, IN)).rows(0, OUT).keys() == {"weight"}
