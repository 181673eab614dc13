"""Kernels are compiled at start, side by side, and none of them while requests are served."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from triton import JITFunction, knobs

from slora_core.adapters.peft_weights import load_packed_adapter
from slora_core.config import EngineConfig
from slora_core.engine.engine import Engine
from tests.factories import make_adapter, make_model
from tests.gpu.cases import ADAPTERS, SMALL_KINDS, check, make_entries
from tests.kernel_names import kernel_names
from tests.on_gpu import needs_gpu
from tests.oracle import GreedyOracle

pytestmark = needs_gpu


@pytest.mark.parametrize(
    "dtype,max_batched_tokens,cuda_graphs",
    [
        ("float32", 2048, True),
        ("float32", 2048, False),
        # Has two tiles of prompts, of which long ones alone would take the smaller.
        ("bfloat16", 512, True),
    ],
)
def test_no_kernel_is_compiled_at_its_launch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    max_batched_tokens: int,
    cuda_graphs: bool,
) -> None:
    _forget_compiled()
    model_dir = make_model(
        tmp_path / "model",
        "llama",
        hidden_size=144,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    adapters = {
        kind: make_adapter(tmp_path / kind, model_dir, seed=index, **ADAPTERS[kind])
        for index, kind in enumerate(kind for kind in SMALL_KINDS if kind is not None)
    }
    # By whether a launch compiled them.
    compiled: dict[bool, list[str]] = {True: [], False: []}

    def record(*, fn: Any, is_manual_warmup: bool, **_: Any) -> None:
        compiled[not is_manual_warmup].append(fn.name)

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "triton"))
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", record)
    config = EngineConfig(
        device="cuda",
        dtype=dtype,
        num_pool_tokens=16384,
        max_batched_tokens=max_batched_tokens,
        max_running_requests=64,
        cuda_graphs=cuda_graphs,
    )
    engine = Engine.from_pretrained(model_dir, config)
    for name, path in adapters.items():
        packed = load_packed_adapter(path, engine.geometry)
        engine.add_adapter(replace(packed, adapter_id=name))
    assert set(compiled[False]) >= kernel_names()
    # More prompts at once than a graph has room for, and fewer.
    entries = make_entries(64, kinds=SMALL_KINDS) + make_entries(8, kinds=SMALL_KINDS, seed=1)
    if dtype == "float32":
        check(GreedyOracle(model_dir, adapters, ignore_eos=True), engine, entries)
    else:
        assert all(engine.generate(entries))
    assert compiled[True] == []


def _forget_compiled() -> None:
    """As in a new process: no kernel is there that another test compiled."""
    for name, module in list(sys.modules.items()):
        if name.startswith("kernels."):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()
