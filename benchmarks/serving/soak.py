"""Mixed load on a server of its own for minutes: nothing may grow, nothing may be answered wrongly.

`python -m benchmarks.serving.soak`, from the repository root: the demo model and numbered copies of
its adapters, in a pool and a host store too small for all of them. Prints a table of what every
process held after the first minutes and at the end, and as the last line JSON. The exit status is
1 where something grew or an answer was not as it should be.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from app.args import SLoRAArgs
from benchmarks.demo.demo_tasks import TASKS
from benchmarks.report import ROOT, add_output_option, make_row, publish
from benchmarks.serving.local_server import APP_NAME, config_args, local_server, say
from benchmarks.serving.process_usage import (
    Growth,
    Usage,
    growth_of_processes,
    usage_of_descendants,
)
from benchmarks.serving.server_files import number_adapters
from benchmarks.serving.soak_load import SoakClients

SOURCES = ROOT / "serve_configs" / "adapters"
# Of a process's own resident memory and of each count, from the first samples after the settling to
# the last ones.
MAX_GROWTH = 0.02
SAMPLE_S = 5.0
# Processes of this project, by the beginning of their names; all others are Ray's own: its daemons,
# Serve's controller and proxies. These grow on a server that nobody asks anything, too: the raylet
# and the proxy took 1.5 MiB each in the first three minutes, in the next three 1.2 and 0.3.
OWN_ROLES = ("ServeReplica:", "slora_core.", "AdapterStoreActor")
RAYS_GROWTH_MIB = 4.0
# What is compared are medians of so long at either end.
MAX_WINDOW_S = 30.0
# Small enough that adapters are evicted from the pool and from the store all the time.
NUM_POOL_TOKENS = 10_000
STORE_BYTES = 224 * 2**20
EXTENT_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Sample:
    """The server at one moment."""

    at_s: float
    processes: dict[int, Usage]
    # By name: of the engine, the store, the registry.
    counts: dict[str, float]


@dataclass
class SoakResult:
    """What a run found."""

    samples: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_done: dict[str, int] = field(default_factory=dict)


class ServerProbe:
    """Looks into the server that this process started."""

    def __init__(self, args: SLoRAArgs, url: str) -> None:
        import ray
        from ray import serve

        from app.registry.client import NAMESPACE
        from app.store.actor import StoreSpec

        self._started_at = time.monotonic()
        self._url = url
        assert args.registry_state_path is not None
        self._state_path = Path(args.registry_state_path)
        self._engine: Any = serve.get_deployment_handle("engine", APP_NAME)
        node_id = ray.get_runtime_context().get_node_id()
        name = StoreSpec.of(args, APP_NAME).actor_name(node_id)
        self._store: Any = ray.get_actor(name, namespace=NAMESPACE)

    def sample(self) -> Sample:
        engine, store = self._stats()
        models = httpx.get(f"{self._url}/v1/models", timeout=30, trust_env=False).json()["data"]
        state_files = self._state_path.parent.glob(f"{self._state_path.name}*")
        counts = {
            "engine: pages owned": engine["num_pages"] - engine["num_free_pages"],
            "store: bytes of extents": store.extent_bytes,
            "store: leases": store.num_leases,
            "registry: models": len(models),
            "registry: bytes of state": sum(path.stat().st_size for path in state_files),
        }
        at_s = time.monotonic() - self._started_at
        return Sample(at_s, usage_of_descendants(os.getpid()), counts)

    def problems_when_idle(self) -> list[str]:
        """What is held although nothing runs."""
        found = []
        deadline = time.monotonic() + 30
        while True:
            engine, store = self._stats()
            held = {
                name: engine[name] for name in ("num_running", "num_waiting", "num_kv_pages")
            } | {"num_leases": store.num_leases}
            if not any(held.values()) or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        if any(held.values()):
            found.append(f"held by nobody: {held}")
        try:
            self._engine.broadcast("check_integrity").results(timeout_s=30)
        except Exception as error:
            found.append(f"the pool's integrity: {error!r}")
        return found

    def _stats(self) -> tuple[dict[str, Any], Any]:
        """What the engine and the store say of themselves."""
        import ray

        [engine] = self._engine.broadcast("stats").results(timeout_s=30)
        return engine, ray.get(self._store.stats.remote(), timeout=30)


async def soak(url: str, probe: ServerProbe, clients: SoakClients, options: Any) -> SoakResult:
    """Run the load for as long as asked, sampling all the while."""
    result = SoakResult()
    await clients.learn()
    ends_at = time.monotonic() + options.duration
    load = asyncio.create_task(clients.run(options.clients, lambda: time.monotonic() > ends_at))
    while not load.done():
        result.samples.append(await asyncio.to_thread(probe.sample))
        say(f"{result.samples[-1].at_s:5.0f} s: {dict(clients.tally.num_done)}")
        await asyncio.wait({load}, timeout=SAMPLE_S)
    await load
    await clients.check_all()
    result.problems = clients.tally.problems + await asyncio.to_thread(probe.problems_when_idle)
    result.num_done = dict(clients.tally.num_done)
    return result


def windows(samples: Sequence[Sample], settle_s: float) -> tuple[list[Sample], list[Sample]]:
    """The first samples after the settling, and the last ones.

    Raises:
        ValueError: too few samples to compare.
    """
    start, end = samples[0].at_s + settle_s, samples[-1].at_s
    length = min(MAX_WINDOW_S, (end - start) / 3)
    first = [sample for sample in samples if start <= sample.at_s <= start + length]
    last = [sample for sample in samples if sample.at_s >= end - length]
    if not first or length <= 0:
        raise ValueError(
            f"the run lasted {end - samples[0].at_s:.0f} s, too short for {settle_s} s"
        )
    return first, last


def growths(
    first: Sequence[Sample], last: Sequence[Sample]
) -> tuple[list[Growth], list[Growth], list[Growth]]:
    """Of memory and descriptors by process, and of the server's counts."""
    memory, descriptors = growth_of_processes(
        (sample.processes for sample in first), (sample.processes for sample in last)
    )
    # The most of either time: counts rise and fall with what runs.
    counts = [
        Growth(name, max(s.counts[name] for s in first), max(s.counts[name] for s in last))
        for name in first[0].counts
    ]
    return memory, descriptors, counts


def has_grown(process: Growth) -> bool:
    """Whether a process took more memory than it may."""
    is_own = process.name.startswith(OWN_ROLES)
    allowed_mib = 0.0 if is_own else RAYS_GROWTH_MIB
    return process.share > MAX_GROWTH and process.last - process.first > allowed_mib


def grown(
    memory: list[Growth], descriptors: list[Growth], counts: list[Growth], num_clients: int
) -> list[str]:
    """What grew beyond the limits, in words."""
    found = [
        f"{g.name} grew from {g.first:g} to {g.last:g} MiB, {g.share:.1%}"
        for g in memory
        if has_grown(g)
    ]
    found += [
        f"{g.name} grew from {g.first:g} to {g.last:g}, {g.share:.1%}"
        for g in counts
        # A client may have an adapter loaded, or a lease taken, that it had not.
        if g.share > MAX_GROWTH and g.last - g.first > num_clients
    ]
    # Connections of the clients come and go.
    found += [
        f"{g.name} has {g.last:.0f} descriptors where it had {g.first:.0f}"
        for g in descriptors
        if g.last > g.first + num_clients
    ]
    return found


def ended(first: Sequence[Sample], last: Sequence[Sample]) -> list[str]:
    """Processes that a server should keep and that are gone."""
    before, after = first[0].processes, last[-1].processes
    return [f"{before[pid].role} {pid} ended" for pid in sorted(set(before) - set(after))]


def server_args(scratch: Path, num_adapters: int) -> tuple[SLoRAArgs, list[str]]:
    """What is served, and the names of its adapters."""
    (scratch / "guests").mkdir()
    names = number_adapters([SOURCES / task for task in TASKS], num_adapters, scratch / "adapters")
    args = config_args(
        adapters_dir=str(scratch / "adapters"),
        allowed_adapter_roots=[str(scratch / "guests")],
        registry_state_path=str(scratch / "registry"),
        packed_cache_dir=str(scratch / "packed"),
        num_pool_tokens=NUM_POOL_TOKENS,
        store_capacity_bytes=STORE_BYTES,
        store_extent_bytes=EXTENT_BYTES,
    )
    return args, names


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--duration", type=float, default=600.0, help="seconds of load")
    parser.add_argument("--settle", type=float, default=120.0, help="seconds that may still grow")
    parser.add_argument("--clients", type=int, default=8, help="at once")
    parser.add_argument("--num-adapters", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8000)
    add_output_option(parser)
    options = parser.parse_args(argv)
    if options.num_adapters < len(TASKS):
        parser.error(f"--num-adapters is {options.num_adapters}; it must be {len(TASKS)} or more")
    return options


def run(options: argparse.Namespace, scratch: Path) -> SoakResult:
    args, names = server_args(scratch, options.num_adapters)
    with local_server(args, options.port) as (url, _):
        probe = ServerProbe(args, url)

        async def load() -> SoakResult:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(
                base_url=url, timeout=120, limits=limits, trust_env=False
            ) as http:
                sources = {task: SOURCES / task for task in TASKS}
                clients = SoakClients(http, names, sources, scratch / "guests", options.seed)
                return await soak(url, probe, clients, options)

        return asyncio.run(load())


def main() -> None:
    options = parse_args()
    with tempfile.TemporaryDirectory(prefix="slora-soak-") as scratch:
        result = run(options, Path(scratch))
    first, last = windows(result.samples, options.settle)
    memory, descriptors, counts = growths(first, last)
    problems = (
        result.problems + grown(memory, descriptors, counts, options.clients) + ended(first, last)
    )
    print(f"{'MiB resident, but for shared memory':<44}{'first':>10}{'last':>10}{'growth':>9}")
    for g in memory:
        print(f"{g.name:<44}{g.first:>10.1f}{g.last:>10.1f}{g.share:>9.2%}")
    all_descriptors = Growth(
        "descriptors", sum(g.first for g in descriptors), sum(g.last for g in descriptors)
    )
    for g in [*counts, all_descriptors]:
        print(f"{g.name:<44}{g.first:>10.0f}{g.last:>10.0f}")
    print(f"done: {result.num_done}; {len(problems)} problems")
    for problem in problems[:20]:
        print(f"  {problem}")
    figures = {
        "num_done": result.num_done,
        "max_memory_growth": round(max(g.share for g in memory), 4),
        "memory_mib": [asdict(g) for g in memory],
        "descriptors": [asdict(g) for g in descriptors],
        "counts": [asdict(g) for g in counts],
        "problems": problems,
    }
    config = {
        name: getattr(options, name) for name in ("duration", "settle", "clients", "num_adapters")
    }
    publish(make_row("soak", figures, config, options.seed), options.output)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
