"""The offline engine benchmark runs every workload on the CPU, and its figures add up."""

import json

import pytest

from benchmarks.engine import bench_engine
from benchmarks.engine.workloads import fixed_batch, poisson_arrivals, shared_prefix

SIZES = {
    "--batches": [1, 3],
    "--streams": [3],
    "--prompt-len": [64],
    "--decode-steps": [6],
    "--num-requests": [12],
    "--lengths": [8, 24],
    "--num-adapters": [0, 5],
    "--num-online-adapters": [5],
    "--num-spread": [30],
    "--num-cold": [2],
    "--load-tokens": [70],
    "--load-rate": [8],
    "--max-running-requests": [8],
    "--max-batched-tokens": [128],
}


def run(capsys, *workloads, **changes):
    """Rows of the command on the tiny shape."""
    options = {"--shape": ["tiny"], "--device": ["cpu"], "--dtype": ["float32"], **SIZES}
    options |= {f"--{name.replace('_', '-')}": values for name, values in changes.items()}
    arguments = [str(word) for name, values in options.items() for word in (name, *values)]
    bench_engine.main([*workloads, *arguments])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(row["config"]["shape"] == "tiny" and row["benchmark"] == "engine" for row in rows)
    return rows


def test_steps(capsys):
    rows = run(capsys, "decode", "prefill", "mixed", "--check")
    decode = [row for row in rows if row["workload"] == "decode"]
    assert [(row["batch"], row["num_adapters"]) for row in decode] == [
        (1, 0),
        (1, 1),
        (3, 0),
        (3, 1),
        (3, 3),
    ]
    # Prefills sample the first token, and more for what is ahead of others; two are not timed.
    assert [row["num_steps"] for row in decode[:2]] == [3, 3]
    assert all(0 < row["num_steps"] <= 3 and row["decode_step_ms"] > 0 for row in decode)
    prefill = [row for row in rows if row["workload"] == "prefill"]
    assert [row["num_adapters"] for row in prefill] == [0, 1, 3]
    rate = prefill[0]["tokens_per_s"] * prefill[0]["prefill_ms"] / 1e3
    assert rate == pytest.approx(3 * 64)
    assert rows[-1]["mixed_step_ms"] > 0 and rows[-1]["chunk"] == 32


def test_throughput(capsys):
    rows = run(capsys, "trace", "spread", num_pool_tokens=[512])
    assert [(row["workload"], row["num_adapters"]) for row in rows] == [
        ("trace", 0),
        ("trace", 5),
        ("spread", 0),
        ("spread", 30),
    ]
    for row in rows:
        assert row["requests_per_s"] * row["seconds"] == pytest.approx(row["num_requests"])
        uses = row["num_adapter_loads"] + row["num_adapter_hits"]
        assert uses == (row["num_requests"] + row["num_preemptions"] if row["num_adapters"] else 0)
        assert ("ratio_to_base" in row) == (row["num_adapters"] > 0)
    # Adapters of the rows before are gone, so that nothing is evicted for the base model.
    assert all(row["num_adapter_evictions"] == 0 for row in rows if row["num_adapters"] == 0)
    # Thirty adapters in a pool of 32 pages, beside their requests.
    assert rows[-1]["num_adapter_evictions"] > 0
    assert rows[-1]["num_adapter_loads"] >= 30 - 5


def test_base_only(capsys):
    rows = run(capsys, "decode", "prefill", "trace", "spread", "--base-only")
    assert [(row["workload"], row["num_adapters"]) for row in rows] == [
        ("decode", 0),
        ("decode", 0),
        ("prefill", 0),
        ("trace", 0),
        ("spread", 0),
    ]


def test_latency(capsys):
    online, *cold = run(capsys, "online", "cold", rate=[200])
    assert online["rate"] == 200 and online["num_adapters"] == 5
    assert 0 < online["ttft_p50_ms"] <= online["ttft_p99_ms"]
    assert 0 < online["inter_token_p50_ms"] <= online["inter_token_p99_ms"]
    idle, *beside = cold
    assert idle["added_ms"] == pytest.approx(idle["cold_ttft_ms"] - idle["resident_ttft_ms"])
    assert [row["kind"] for row in beside] == ["none", "resident", "cold", "none"]
    num_short = int(8 * 70 * 0.015)
    # The streams' own adapters were loaded by `online`.
    assert [row["num_adapter_loads"] for row in beside] == [0, 0, num_short, 0]
    assert beside[2]["short_steps_max"] >= beside[2]["short_steps_p50"] >= 0
    assert all(0 < row["inter_token_p50_ms"] <= row["inter_token_p99_ms"] for row in beside)


def test_a_rate_is_a_share_of_what_was_measured(capsys):
    [online] = run(capsys, "online")
    assert online["rate"] > 0


def test_prefix(capsys):
    rows = run(capsys, "prefix")
    assert [row["requests"] for row in rows] == ["nothing shared", "a new prefix", "the same again"]
    prompts = 3 * (188 + 20)
    assert [row["num_prompt_tokens"] for row in rows] == [prompts] * 3
    # Eleven full pages of the prefix, found by two requests, then whole prompts but their ends.
    assert [row["num_computed_tokens"] for row in rows] == [
        prompts,
        prompts - 2 * 11 * 16,
        prompts - 3 * 12 * 16,
    ]


def test_long_prompt(capsys):
    sizes = {"long_prompt_len": [1000], "prompt_len": [20], "streams": [7]}
    [first_come] = run(capsys, "long-prompt", shared_prefill_fraction=[0], **sizes)
    [shared] = run(capsys, "long-prompt", **sizes)
    for row in (first_come, shared):
        # 1,000 tokens, or 7 x 20, in steps of 128.
        assert (row["long_alone_steps_p50"], row["short_alone_steps_p50"]) == (8, 1)
        assert row["long_to_alone"] == row["long_ttft_p50_ms"] / row["long_alone_ttft_p50_ms"]
    assert (first_come["short_steps_p50"], first_come["long_steps_p50"]) == (9, 8)
    assert (shared["short_steps_p50"], shared["long_steps_p50"]) == (2, 10)


@pytest.mark.parametrize(
    "arguments,named",
    [
        (["decode", "--device", "cpu", "--shape", "large"], "large"),
        (["sleep"], "sleep"),
        (["sync-free", "--device", "cpu"], "CUDA"),
        (["prefix", "decode", "--device", "cpu"], "alone"),
        (
            ["trace", "--device", "cpu", "--num-requests", "0"],
            "--num-requests: 0 is not at least 1",
        ),
        (["trace", "--device", "cpu", "--lengths", "9", "8"], "--lengths are [9, 8]"),
        (["trace", "--device", "cpu", "--num-adapters", "-1"], "--num-adapters are [-1]"),
        (["online", "--device", "cpu", "--rate", "0"], "--rate: 0.0 is not above 0"),
        (["decode", "--device", "cpu", "--decode-steps", "1"], "--decode-steps is 1"),
        (
            ["long-prompt", "--device", "cpu", "--shared-prefill-fraction", "1"],
            "--shared-prefill-fraction: 1.0 is not at least 0 and below 1",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, named, capsys):
    with pytest.raises(SystemExit):
        bench_engine.main(arguments)
    assert named in capsys.readouterr().err


def test_workloads_are_functions_of_their_seeds():
    assert fixed_batch([None], 5, 1, 100, 1) == fixed_batch([None], 5, 1, 100, 1)
    assert fixed_batch([None], 5, 1, 100, 1) != fixed_batch([None], 5, 1, 100, 2)
    arrivals = poisson_arrivals(1000, 10.0, 3)
    assert arrivals == sorted(arrivals) and 90 < arrivals[-1] < 110
    prompts = [r.prompt_ids for r in shared_prefix(3, 8, 4, 1, "a", 100, 5)]
    assert len({tuple(p[:8]) for p in prompts}) == 1 and len({tuple(p[8:]) for p in prompts}) == 3
