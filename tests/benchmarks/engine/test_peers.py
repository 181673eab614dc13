"""Peers of the engine run the same cases; what they lack, or where they are not installed, is said.

vLLM is a stand-in here: it sees what the backend asks of it, not whether vLLM would accept it.
"""

import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks.engine import bench_engine
from benchmarks.engine.peft_backend import PeftBackend

TINY = ["--shape", "tiny", "--batches", "1", "3", "--streams", "3", "--prompt-len", "24"]
TINY += ["--decode-steps", "4", "--lengths", "4", "12", "--num-requests", "8"]
# By which vLLM 0.26 starts its engine; "fork" where CUDA does not look initialised.
START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
ON_CPU = ["--device", "cpu", "--dtype", "float32"]


def rows_of(capsys, *arguments):
    bench_engine.main([*arguments, *TINY])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def cases(rows, workload):
    return [(r["batch"], r["num_adapters"]) for r in rows if r["workload"] == workload]


def test_peft(capsys):
    rows = rows_of(capsys, "decode", "prefill", "--backend", "peft", "--setting", "S2", *ON_CPU)
    assert cases(rows, "decode") == [(1, 0), (1, 1), (3, 0), (3, 1), (3, 3)]
    assert cases(rows, "prefill") == [(3, 0), (3, 1), (3, 3)]
    for row in rows:
        assert row["config"]["backend"] == "peft" and row["config"]["setting"] == "S2"
        assert ("ratio_to_base" in row) == (row["num_adapters"] > 0)
    decode = [r for r in rows if r["workload"] == "decode"]
    assert all(r["num_steps"] == 3 and r["decode_step_ms"] > 0 for r in decode)
    base, one = decode[:2]
    assert one["ratio_to_base"] == one["decode_step_ms"] / base["decode_step_ms"]


def test_peft_applies_the_adapters_that_a_case_names():
    args = ["decode", "--backend", "peft", "--setting", "S2", *TINY, *ON_CPU]
    backend = PeftBackend(bench_engine.parse_args(args))
    prompts = backend._prompts(3, 24)
    logits = {}
    for n in (0, 1, 3):
        with backend._adapters(3, n) as names, torch.no_grad():
            logits[n] = backend._model(input_ids=prompts, **names).logits[:, -1]
    differs = ~torch.isclose(logits[3], logits[1], rtol=1e-3, atol=1e-5).all(dim=-1)
    # The first request's adapter is the same in both.
    assert differs.tolist() == [False, True, True]
    assert not torch.isclose(logits[0], logits[1], rtol=1e-3, atol=1e-5).all(dim=-1).any()
    ranks = [backend._model.peft_config[f"adapter-{i}"].r for i in range(3)]
    assert ranks == [64, 32, 16]


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in that answers every request; the calls it saw."""
    calls = SimpleNamespace(options={}, generate=[], start_methods=[])
    # What a user may have set; put back at the end.
    monkeypatch.setenv(START_METHOD, "fork")

    class LLM:
        def __init__(self, **options):
            calls.options = options
            calls.start_methods.append(os.environ[START_METHOD])

        def generate(self, prompts, params, *, use_tqdm, lora_request):
            calls.generate.append((prompts, params, lora_request))
            tokens = [[0] * p.max_tokens for p in params]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=t)]) for t in tokens]

    package, lora, request = (ModuleType(n) for n in ("vllm", "vllm.lora", "vllm.lora.request"))
    package.__spec__ = ModuleSpec("vllm", None)
    package.SamplingParams = SimpleNamespace

    def imported(name):
        if name != "LLM":
            raise AttributeError(name)
        calls.start_methods.append(os.environ[START_METHOD])
        return LLM

    package.__getattr__ = imported
    request.LoRARequest = lambda name, number, path: (name, number, path)
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return calls


def test_vllm(vllm, capsys):
    peer = ["--backend", "vllm", "--setting", "S2", "--max-loras", "4", "--num-adapters", "0", "70"]
    rows = rows_of(capsys, "decode", "prefill", "trace", *peer)
    assert cases(rows, "decode") == [(1, 0), (1, 1), (3, 0), (3, 1), (3, 3)]
    trace = [r for r in rows if r["workload"] == "trace"]
    assert [(r["num_adapters"], r["num_requests"]) for r in trace] == [(0, 8), (70, 8)]
    assert vllm.options["enable_lora"] and not vllm.options["enable_prefix_caching"]
    wanted = {"max_loras": 4, "max_lora_rank": 64, "max_cpu_loras": 70, "load_format": "dummy"}
    assert wanted.items() <= vllm.options.items()
    assert trace[0]["config"]["max_loras"] == 4
    prompts, params, adapters = vllm.generate[-1]
    assert len(prompts) == len(params) == len(adapters) == 8
    assert 4 <= len(prompts[0]["prompt_token_ids"]) <= 12 and params[0].ignore_eos
    for name, number, path in adapters:
        # Copies alias 64 directories, of the rank of their own number.
        assert name == f"adapter-{number - 1}"
        assert path.endswith(f"/adapter-{(number - 1) % 64}")
    assert vllm.generate[0][2] is None


def test_vllm_starts_no_process_by_fork(vllm, capsys):
    rows_of(capsys, "decode", "--backend", "vllm", "--base-only")
    # When it is imported, and when it starts its engine.
    assert vllm.start_methods == ["spawn", "spawn"]


def test_vllm_without_lora(vllm, capsys):
    rows = rows_of(capsys, "decode", "--backend", "vllm", "--base-only")
    assert cases(rows, "decode") == [(1, 0), (3, 0)]
    assert "enable_lora" not in vllm.options


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["trace", "--backend", "peft"], "peft has no trace; it has decode, prefill"),
        (["decode", "--backend", "peft", "--check"], "--check is of --backend ours"),
        (["decode", "--backend", "peft", "--num-pool-tokens", "64"], "--num-pool-tokens is of"),
        (["decode", "--backend", "sglang"], "sglang"),
    ],
)
def test_what_a_peer_lacks_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_engine.main([*arguments, *ON_CPU])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["peft", "vllm"])
def test_a_peer_that_is_not_installed_is_named(name, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        bench_engine.main(["decode", "--backend", name, *ON_CPU])
    assert f"the package {name} is not installed" in capsys.readouterr().err
