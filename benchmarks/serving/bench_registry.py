"""Thousands of registrations: loads over HTTP on a running server, or the checks at its start.

`python -m benchmarks.serving.bench_registry loads` serves a tiny model, loads tiny adapters over
HTTP, several at once, and asks for the list of models; `check` has a registry check adapters of a
7B model's shape as it does at the start, without a server, and tells how much of it was reading and
hashing. The last line is JSON.
"""

import argparse
import asyncio
import logging
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from app.args import SLoRAArgs
from app.registry.inspector import AdapterInspector
from app.registry.pools import LivingPools
from app.registry.registry import AdapterRegistry
from benchmarks.report import add_output_option, make_row, publish
from benchmarks.serving.local_server import ServerError, local_server, say
from benchmarks.serving.server_files import number_adapters
from tests.factories import (
    ATTENTION_MODULES,
    make_geometry,
    make_model,
    make_random_adapter,
)
from tests.tiny_tokenizer import VOCAB_SIZE, make_tokenizer

# Asked for after the loads.
NUM_LISTS = 20
# Rank 8 on q, k, v, o in bfloat16: 16.8 MB an adapter.
LLAMA_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["loads", "check"])
    parser.add_argument("--num-adapters", type=int, help="default: 5,000 loads, 200 checks")
    parser.add_argument("--concurrency", type=int, default=16, help="loads at once (default 16)")
    parser.add_argument("--port", type=int, default=8000)
    add_output_option(parser)
    args = parser.parse_args(argv)
    num_adapters = args.num_adapters or (5000 if args.what == "loads" else 200)
    with tempfile.TemporaryDirectory(prefix="slora-bench-") as scratch:
        if args.what == "check":
            figures = measure_checks(Path(scratch), num_adapters)
        else:
            try:
                figures = measure_loads(Path(scratch), num_adapters, args.concurrency, args.port)
            except ServerError as error:
                sys.exit(f"the server did not start: {error}")
    config = {"num_adapters": num_adapters}
    if args.what == "loads":
        config["concurrency"] = args.concurrency
    publish(make_row(f"registry_{args.what}", figures, config, seed=0), args.output)


def measure_loads(root: Path, num_adapters: int, concurrency: int, port: int) -> dict[str, Any]:
    """Figures of a server that gets all adapters over HTTP."""
    model = make_tokenizer(make_model(root / "model", vocab_size=VOCAB_SIZE))
    source = make_random_adapter(root / "sources" / "tiny", model, rank=2)
    say(f"making {num_adapters} adapters")
    names = number_adapters([source], num_adapters, root / "extra")
    args = SLoRAArgs(
        model=str(model),
        allowed_adapter_roots=[str(root / "extra")],
        registry_state_path=str(root / "state"),
        packed_cache_dir=str(root / "packed"),
        cpus_per_replica=0.1,
        num_threads=1,
    )
    with local_server(args, port) as (url, _):
        figures = asyncio.run(_load_all(url, names, concurrency))
    print(
        f"{num_adapters} loads, {concurrency} at once: {figures['loads_s']:.1f} s, each "
        f"{figures['load_p50_ms']:.0f} ms (p50), {figures['load_p99_ms']:.0f} ms (p99); "
        f"the list of models: {figures['list_ms']:.0f} ms"
    )
    return figures


async def _load_all(url: str, names: list[str], concurrency: int) -> dict[str, Any]:
    waiting = iter(names)
    times: list[float] = []
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(
        base_url=url, timeout=60.0, limits=limits, trust_env=False
    ) as client:

        async def load_some() -> None:
            for name in waiting:
                started_at = time.perf_counter()
                body = {"lora_name": name, "lora_path": name}
                answer = await client.post("/v1/load_lora_adapter", json=body)
                assert answer.status_code == 200, f"{name}: {answer.text}"
                times.append(time.perf_counter() - started_at)

        started_at = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(load_some())
        loads_s = time.perf_counter() - started_at
        list_times = []
        for _ in range(NUM_LISTS):
            started_at = time.perf_counter()
            cards = (await client.get("/v1/models")).json()["data"]
            list_times.append(time.perf_counter() - started_at)
            assert {card["id"] for card in cards} >= set(names), "not every adapter is listed"
    percentiles = statistics.quantiles(times, n=100)
    return {
        "loads_s": loads_s,
        "load_p50_ms": 1e3 * percentiles[49],
        "load_p99_ms": 1e3 * percentiles[98],
        "list_ms": 1e3 * statistics.median(list_times),
    }


def measure_checks(root: Path, num_adapters: int) -> dict[str, Any]:
    """Figures of a registry's check of adapters, by its own line of the log."""
    from transformers import AutoConfig

    model = AutoConfig.for_model("llama", **LLAMA_7B)
    source = make_random_adapter(
        root / "sources" / "real",
        model,
        target_modules=ATTENTION_MODULES,
        scale=0.01,
        dtype=torch.bfloat16,
    )
    say(f"making {num_adapters} adapters")
    number_adapters([source], num_adapters, root / "adapters")
    geometry = make_geometry(model, dtype=torch.bfloat16)
    log = _Lines()
    logger = logging.getLogger("app.registry.inspector")
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    registry = AdapterRegistry(AdapterInspector(geometry, [root / "adapters"]), LivingPools(None))
    failures = registry.scan(root / "adapters")
    assert not failures, f"{failures[0]}"
    [line] = log.lines
    print(line)
    found = re.search(r"in ([\d.]+) s: reading and hashing are (\d+)%", line)
    assert found is not None, line
    return {"check_s": float(found[1]), "reading_and_hashing": int(found[2]) / 100}


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


if __name__ == "__main__":
    main()
