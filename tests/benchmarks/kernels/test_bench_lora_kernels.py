"""What the benchmark of the LoRA kernels measures is right, and wrong results are not reported."""

import pytest
import torch

from benchmarks.engine.workloads import SHAPES
from benchmarks.kernels import lora_cases, lora_sweep
from benchmarks.kernels.lora_prefill import check_prefill, make_prefill
from kernels import torch_ops, triton_ops
from tests.kernels.cases import DEVICE


@pytest.fixture
def adapters(monkeypatch):
    monkeypatch.setattr(lora_cases, "NUM_ADAPTERS", 4)
    return lora_cases.make_adapters(SHAPES["tiny"], (8, 20), DEVICE, torch.float32)


def test_weights_that_must_move(adapters):
    # q and o have 128 outputs, k and v 64; every input is 128.
    elems = 2 * (128 + 128) + 2 * (128 + 64)
    assert adapters.ranks == [8, 20, 8, 20]
    assert adapters.layer_bytes([0, 0, 0]) == 8 * elems * 4
    assert adapters.layer_bytes([0, 1, 1, 3]) == (8 + 20 + 20) * elems * 4
    used = set(adapters.page_tables.flatten().tolist())
    assert used == set(range(adapters.pool.shape[0])), "every page is some adapter's"


@pytest.mark.parametrize("slots", [[2], [3, 1, 1, 0, 3], [0] * 17])
def test_calls_are_compared_with_the_twins(adapters, slots, monkeypatch):
    segments = lora_cases.make_segments(adapters, slots)
    calls = lora_cases.layer_calls(adapters, segments, 1)
    assert {kind: len(some) for kind, some in calls.items()} == {
        "shrink": 2,
        "expand": 2,
        "both": 2,
    }
    for some in calls.values():
        for call in some:
            call()
    lora_cases.check_layer(adapters, segments, 1)
    monkeypatch.setattr(triton_ops, "lora_expand", lambda y, *_, **__: y.add_(1.0))
    with pytest.raises(AssertionError, match="differs from its twin"):
        lora_cases.check_layer(adapters, segments, 1)


def test_a_layer_over_prompts_is_compared_with_the_twins(monkeypatch):
    inputs = make_prefill(SHAPES["tiny"], 3, 24, 16, DEVICE, torch.float32)
    assert inputs.attention.kv_places.unique().numel() == inputs.delta.shape[0] == 72
    assert inputs.lora.modules == set(range(7))
    check_prefill(inputs, (triton_ops, torch_ops), 1e-4)
    base, lora = (inputs.calls(torch_ops, with_lora)[0]() for with_lora in (False, True))
    assert not torch.equal(base, lora)
    monkeypatch.setattr(triton_ops, "lora_expand", lambda *_: None)
    with pytest.raises(AssertionError, match="differs from its twin"):
        check_prefill(inputs, (triton_ops, torch_ops), lora_cases.TOLERANCE)


def test_sweep_tries_every_launch(monkeypatch, capsys):
    monkeypatch.setattr(lora_cases, "NUM_ADAPTERS", 2)
    for name, value in {"NUM_LAYERS": 1, "NUM_IDENTICAL": 1, "BATCH": 2}.items():
        monkeypatch.setattr(lora_sweep, name, value)
    monkeypatch.setattr(lora_sweep, "SHRINKS", ((2, 64, 2),))
    monkeypatch.setattr(lora_sweep, "EXPANDS", ((64, 64, 1), (96, 64, 1)))

    def time_us(calls):
        for call in calls[:1]:
            call()
        return float(len(calls))

    lora_sweep.sweep(SHAPES["tiny"], (8,), DEVICE, torch.float32, 0, time_us)
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if "Error" in line]
    # Not a power of two.
    assert len(failed) == 4
    assert all(" 96 columns" in line for line in failed)
    assert not [line for line in lines if "differs" in line]
    for name in ("shrink 2 parts", "expand 64 columns", "silu_mul 64 columns"):
        assert sum(name in line for line in lines) == 2
