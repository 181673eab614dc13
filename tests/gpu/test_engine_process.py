"""An engine process on a GPU: adapters from shared memory, and memory back whoever ends it."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from app.store.memory import HostStore
from slora_core.adapters.peft_weights import read_peft_adapter
from slora_core.config import EngineConfig
from slora_core.engine.process import AsyncEngine
from slora_core.engine.protocol import EngineSpec
from slora_core.errors import EngineDeadError
from slora_core.requests import FinishReason, Request, SamplingParams
from tests.factories import ALL_MODULES, make_adapter, make_geometry
from tests.on_gpu import needs_gpu
from tests.oracle import GreedyOracle, assert_same_greedy

pytestmark = needs_gpu

# A pool of 2 GiB, so that its coming and going is seen; few graphs, so that the start is short.
CONFIG = EngineConfig(
    device="cuda",
    num_pool_tokens=4 << 20,
    max_batched_tokens=64,
    max_running_requests=8,
    graph_max_rank=16,
    max_inflight_steps=2,
)
POOL_BYTES = 2 << 30
PROMPT = [5, 17, 99, 3, 42, 8]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
# Long enough never to end by itself within a test.
ENDLESS = SamplingParams(max_tokens=490, temperature=0, ignore_eos=True)


def _free_bytes() -> int:
    return torch.cuda.mem_get_info()[0]


def _until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def test_an_adapter_of_the_slab_an_abort_and_a_kill(model_dir: Path, tmp_path: Path) -> None:
    directory = make_adapter(
        tmp_path / "adapter", model_dir, seed=3, rank=8, target_modules=ALL_MODULES
    )
    oracle = GreedyOracle(model_dir, {"adapter": directory}, ignore_eos=True)
    geometry = make_geometry(model_dir, page_tokens=CONFIG.page_tokens)
    summary, weights = read_peft_adapter(directory, geometry)
    store = HostStore(geometry, capacity_bytes=1 << 24, extent_bytes=1 << 22)
    store.put(summary.adapter_id, summary.layout, weights)
    free = _free_bytes()

    async def main() -> None:
        engine = AsyncEngine(EngineSpec(str(model_dir), "safetensors", CONFIG, num_threads=1))
        try:
            info = await engine.start()
            assert _free_bytes() < free - POOL_BYTES
            engine.add_adapter(store.lease(summary.adapter_id, os.getpid()))
            for adapter, adapter_id in (("adapter", summary.adapter_id), (None, None)):
                text: list[int] = []
                with engine.generate(Request(PROMPT, GREEDY, adapter_id)) as stream:
                    async for delta in stream:
                        assert delta.error is None
                        text += delta.token_ids
                expected = oracle.generate(PROMPT, GREEDY.max_tokens, adapter)
                assert_same_greedy(oracle, PROMPT, text, expected, adapter)

            reasons = []
            with engine.generate(Request(PROMPT, ENDLESS, summary.adapter_id)) as stream:
                async for delta in stream:
                    engine.abort(stream.request_id)
                    reasons.append(delta.finish_reason)
            assert reasons[-1] is FinishReason.ABORT
            await engine.release_adapter_source(summary.adapter_id)
            stats = await engine.stats()
            assert (stats.num_running, stats.num_kv_pages, stats.num_adapter_loads) == (0, 0, 1)
            await engine.check_integrity()

            with engine.generate(Request(PROMPT, ENDLESS)) as stream:
                await anext(stream)
                os.kill(info.pid, signal.SIGKILL)
                deltas = [delta async for delta in stream]
            assert isinstance(deltas[-1].error, EngineDeadError)
            with pytest.raises(EngineDeadError):
                engine.generate(Request(PROMPT, GREEDY))
        finally:
            engine.close()

    try:
        asyncio.run(main())
    finally:
        store.close()
    _until(lambda: _free_bytes() > free - POOL_BYTES // 8)


def test_memory_comes_back_with_the_death_of_the_owner(model_dir: Path) -> None:
    code = f"""
    import asyncio
    from slora_core.engine.protocol import EngineSpec
    from slora_core.engine.process import AsyncEngine
    from slora_core.requests import Request
    from tests.gpu.test_engine_process import CONFIG, ENDLESS, PROMPT

    async def main():
        engine = AsyncEngine(EngineSpec({str(model_dir)!r}, "safetensors", CONFIG))
        await engine.start()
        print("ready", flush=True)
        while True:
            with engine.generate(Request(PROMPT, ENDLESS)) as stream:
                async for _ in stream:
                    pass

    asyncio.run(main())
    """
    free = _free_bytes()
    root = Path(__file__).resolve().parents[2]
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
        assert _free_bytes() < free - POOL_BYTES
    finally:
        owner.kill()
        owner.wait()
    _until(lambda: _free_bytes() > free - POOL_BYTES // 8)
