"""The benchmark of attention reports on right results only, and a sweep outlives its failures."""

import pytest
import torch

from benchmarks.kernels import attention_sweep, bench_attention
from benchmarks.kernels.attention_cases import AttentionCase, AttentionInputs, standard_cases
from benchmarks.kernels.attention_sweep import fastest, sweep, sweep_table
from benchmarks.kernels.bench_attention import WrongResultError, run, table
from kernels.attention_launch import AttentionLaunch
from tests.kernels.cases import DEVICE

CASES = [
    AttentionCase("decode, tiny", 4, 2, (100, 1, 33), head_dim=16),
    AttentionCase("prefill, tiny", 4, 2, (40, 9), (8, 9), head_dim=16),
]


@pytest.fixture
def pool() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1 << 16, generator=generator).to(DEVICE, torch.float16)


def time_us(calls) -> float:
    for call in calls:
        call()
    return 2.0 * len(calls)


def test_rows_say_how_much_of_a_copy_was_reached(pool: torch.Tensor) -> None:
    rows = run(pool, CASES, 0, time_us, copy_bytes_per_s=1e9)
    decode, prefill = rows
    # 134 tokens, K and V of 2 heads of 16, two bytes each; the pool has room for several layers.
    us = decode["us"]
    assert decode["tb_per_s"] == round(134 * 2 * 2 * 16 * 2 / us / 1e6, 3)
    assert decode["num_layers"] == 5
    assert prefill["us"] > 0
    text = table(rows, 1e9)
    assert "decode, tiny" in text
    assert "prefill, tiny" in text


def test_flops_count_what_the_mask_lets_through() -> None:
    # Rows of the chunk see 3, 4 and 5 tokens.
    case = AttentionCase("", num_heads=2, num_kv_heads=1, context_lens=(5,), chunk_lens=(3,))
    assert case.flops == 4 * 12 * 2 * 128


def test_no_report_where_a_result_is_not_the_twins(
    pool: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = AttentionInputs.attend
    monkeypatch.setattr(AttentionInputs, "attend", lambda self, *args: attend(self, *args) + 0.1)
    with pytest.raises(WrongResultError, match="decode, tiny"):
        run(pool, CASES, 0, time_us, 1e9)


def test_a_case_that_cannot_run_is_a_row_with_its_error(
    pool: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = AttentionInputs.attend

    def fail(self: AttentionInputs, *args: object) -> torch.Tensor:
        if self.case.chunk_lens:
            raise RuntimeError("out of shared memory")
        return attend(self, *args)

    monkeypatch.setattr(AttentionInputs, "attend", fail)
    rows = run(pool, CASES, 0, time_us, 1e9)
    assert "us" in rows[0]
    assert rows[1] == {"case": "prefill, tiny", "error": "RuntimeError: out of shared memory"}
    assert "out of shared memory" in table(rows, 1e9)


def test_sweep_reports_failing_variants(
    pool: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Twelve tokens are no power of two.
    launches = [AttentionLaunch(tokens, 4, 2) for tokens in (32, 12)]
    monkeypatch.setattr(attention_sweep, "DECODE_LAUNCHES", launches)
    monkeypatch.setattr(attention_sweep, "PREFILL_LAUNCHES", launches)
    monkeypatch.setattr(attention_sweep, "SPLIT_PROGRAMS", (4,))
    batches = [bench_attention.make_inputs(pool, case, 0) for case in CASES]
    rows = sweep(batches, time_us, timeout_s=60.0)
    decode, prefill = rows.values()
    assert isinstance(decode["32 tokens, 4 warps, 2 stages"], float)
    assert isinstance(decode["12 tokens, 4 warps, 2 stages"], str)
    assert isinstance(prefill["64 rows, 32 tokens, 4 warps, 2 stages"], float)
    assert len(decode) == 2 + 3
    assert "1 failed: " in sweep_table(rows)
    assert len(fastest(rows, 3)["decode, tiny"]) == 3


def test_sweep_ends_with_its_time(pool: torch.Tensor) -> None:
    batches = [bench_attention.make_inputs(pool, CASES[0], 0)]
    assert "not tried for lack of time" in sweep_table(sweep(batches, time_us, timeout_s=0.0))


def test_standard_cases_have_names_of_their_own() -> None:
    cases = standard_cases(seed=0)
    assert len({case.name for case in cases}) == len(cases) == 16
    assert sum(map(bench_attention._is_swept, cases)) == 11
