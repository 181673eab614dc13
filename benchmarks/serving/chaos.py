"""Kills the server's parts in turn under load: nothing may be lost, wrong or left over.

`python -m benchmarks.serving.chaos`, from the repository root: engines, replicas, ingresses, the
registry, a node's store and a node's raylet end by SIGKILL, some of them twice within seconds,
under streams and whole answers, greedy and sampled, over twenty adapters of a tiny model. Each text
is compared with the one that was computed alone. Prints a table of kills and pauses, and as the
last line JSON; the exit status is 1 where a request was lost, a text was wrong or anything was
left.
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

from app.args import SLoRAArgs
from benchmarks.report import add_output_option, make_row, publish
from benchmarks.serving.chaos_cluster import CPUS_PER_ENGINE, ChaosCluster, chaos_cluster
from benchmarks.serving.chaos_load import Answer, ChaosClients, Tally, Task
from benchmarks.serving.local_server import say
from tests.factories import make_model, make_random_adapter
from tests.tiny_tokenizer import VOCAB_SIZE, make_tokenizer

BASE = "base"
NUM_ADAPTERS = 20
RANKS = (4, 8, 16)
# In turn; what is named twice is killed twice within TWICE_S, the second time whichever is there.
KILLS = (
    *(("engine",), ("replica",), ("store",), ("registry",), ("ingress",), ("node",)),
    *(("engine", "engine"), ("registry", "store"), ("replica", "replica"), ("ingress", "engine")),
)
TWICE_S = 2.0
# Kinds that hold clients' connections, so that a client has to try once more.
HOLD_CONNECTIONS = ("ingress", "node")
LENGTHS_S = {"5m": 300.0, "10m": 600.0}
SHORT = "short"
SHORT_KILLS = (("engine", "replica"), ("ingress",), ("node",))


@dataclass(frozen=True)
class Kill:
    """What was killed, when, and how long until all replicas were there again."""

    kinds: tuple[str, ...]
    at_s: float
    recovered_s: float


@dataclass(frozen=True)
class Row:
    """Of all kills of one kind."""

    kinds: str
    num_kills: int
    num_running: int
    pause_p50_s: float
    pause_p99_s: float
    num_retries: int
    recovered_s: float


def make_tasks(seed: int, num_tasks: int) -> list[Task]:
    """Over all adapters and the base; half of them sampled, half of them streamed."""
    names = [BASE, *(f"adapter-{index}" for index in range(NUM_ADAPTERS))]
    tasks = []
    for index in range(num_tasks):
        body = {
            "prompt": f"request {index}, " + "which is about something, " * (index % 5),
            "max_tokens": 100 + 37 * (index % 9),
            "temperature": 0.8 if index % 2 else 0.0,
            "seed": seed + index,
            "ignore_eos": True,
            "stream": index % 4 < 3,
        }
        tasks.append(Task(names[index % len(names)], body))
    return tasks


def server_args(scratch: Path) -> SLoRAArgs:
    model = make_model(scratch / "model", vocab_size=VOCAB_SIZE, max_position_embeddings=2048)
    make_tokenizer(model)
    for index in range(NUM_ADAPTERS):
        folder = scratch / "adapters" / f"adapter-{index}"
        make_random_adapter(folder, model, seed=index, rank=RANKS[index % len(RANKS)])
    return SLoRAArgs(
        model=str(model),
        served_model_name=BASE,
        adapters_dir=str(scratch / "adapters"),
        packed_cache_dir=str(scratch / "packed"),
        num_pool_tokens=8192,
        num_replicas=2,
        num_ingress_replicas=2,
        num_threads=1,
        cpus_per_replica=CPUS_PER_ENGINE,
        store_capacity_bytes=2**26,
        store_extent_bytes=2**24,
    )


def turns_of(length: str) -> Iterator[tuple[str, ...]]:
    """What is killed, one after another, until the time is over."""
    if length == SHORT:
        yield from SHORT_KILLS
        return
    ends_at = time.monotonic() + LENGTHS_S[length]
    for kinds in itertools.cycle(KILLS):
        if time.monotonic() > ends_at:
            return
        yield kinds


def kill_in_turn(
    cluster: ChaosCluster, turns: Iterable[tuple[str, ...]], quiet_s: float
) -> Iterator[Kill]:
    """Kill one after another, each once all is there again and has been for a while."""
    for kinds in turns:
        time.sleep(quiet_s)
        at_s = time.monotonic()
        for number, kind in enumerate(kinds):
            if number:
                time.sleep(TWICE_S)
            pid = cluster.victims[kind]()
            say(f"killed {kind}, process {pid}")
        cluster.wait_whole()
        recovered_s = time.monotonic() - at_s
        say(f"all there again after {recovered_s:.1f} s")
        yield Kill(kinds, at_s, recovered_s)


def make_rows(kills: Sequence[Kill], tally: Tally) -> list[Row]:
    """Pauses are the longest ones of the requests that ran at a kill, and that it may have made."""
    rows = []
    for kinds in dict.fromkeys(kill.kinds for kill in kills):
        same = [kill for kill in kills if kill.kinds == kinds]
        met = [
            answer
            for kill in same
            for answer in tally.answers
            if answer.started_at <= kill.at_s <= answer.ended_at
        ]
        pauses = [_pause(answer) for answer in met]
        cuts = quantiles(pauses, n=100, method="inclusive") if len(pauses) > 1 else [0.0] * 99
        rows.append(
            Row(
                " + ".join(kinds),
                len(same),
                len(met),
                cuts[49],
                cuts[98],
                sum(answer.num_tries - 1 for answer in met),
                max(kill.recovered_s for kill in same),
            )
        )
    return rows


def _pause(answer: Answer) -> float:
    if answer.num_tries == 1:
        return answer.longest_gap_s
    # All that the first try and the wait before the second one took.
    return answer.gap_began_at + answer.longest_gap_s - answer.started_at


def judge(tally: Tally, kills: Sequence[Kill], left: Sequence[str]) -> list[str]:
    """What should not have been, in words."""
    problems = [f"lost: {line}" for line in tally.lost] + [f"wrong: {line}" for line in tally.wrong]
    problems += [f"left over: {line}" for line in left]
    excused = [
        (kill.at_s, kill.at_s + kill.recovered_s + 1.0)
        for kill in kills
        if set(kill.kinds) & set(HOLD_CONNECTIONS)
    ]
    problems += [
        f"a client had to try again: {reason}"
        for at_s, reason in tally.failures
        if not any(begin <= at_s <= end for begin, end in excused)
    ]
    return problems


def run(options: argparse.Namespace, scratch: Path) -> tuple[Tally, list[Kill], list[str]]:
    kills: list[Kill] = []
    knows_texts, is_over = threading.Event(), threading.Event()
    tasks = make_tasks(options.seed, options.tasks)
    with chaos_cluster(server_args(scratch), options.port, options.seed) as cluster:

        async def load() -> Tally:
            clients = ChaosClients(cluster.url, tasks, options.seed)
            num_unsteady = await clients.learn()
            say(
                f"{len(tasks) - num_unsteady} texts are known; {num_unsteady} depend on their batch"
            )
            knows_texts.set()
            await clients.run(options.clients, is_over.is_set)
            await clients.close()
            return clients.tally

        # Nodes can be started in the main thread alone.
        with ThreadPoolExecutor(1) as pool:
            try:
                loading = pool.submit(asyncio.run, load())
                while not (knows_texts.wait(1.0) or loading.done()):
                    pass
                kills.extend(kill_in_turn(cluster, turns_of(options.length), options.quiet))
            finally:
                is_over.set()
            tally = loading.result()
        left = cluster.left_over() + cluster.close()
    return tally, kills, left


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", choices=[SHORT, *LENGTHS_S], default="10m", help="of the load")
    parser.add_argument("--clients", type=int, default=16, help="at once")
    parser.add_argument("--tasks", type=int, default=63, help="different requests")
    parser.add_argument("--quiet", type=float, default=5.0, help="seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8000)
    add_output_option(parser)
    return parser.parse_args(argv)


def main() -> None:
    options = parse_args()
    with tempfile.TemporaryDirectory(prefix="slora-chaos-") as scratch:
        tally, kills, left = run(options, Path(scratch))
    rows = make_rows(kills, tally)
    problems = judge(tally, kills, left)
    titles = ("killed", "times", "requests", "pause p50, s", "p99, s", "retries", "whole again, s")
    print("".join(f"{title:>16}" for title in titles))
    for row in rows:
        print(
            f"{row.kinds:>16}{row.num_kills:>16}{row.num_running:>16}{row.pause_p50_s:>16.2f}"
            f"{row.pause_p99_s:>16.2f}{row.num_retries:>16}{row.recovered_s:>16.1f}"
        )
    print(f"{len(tally.answers)} answers, {len(kills)} rounds of kills, {len(problems)} problems")
    for problem in problems[:20]:
        print(f"  {problem}")
    figures: dict[str, Any] = {
        "num_answers": len(tally.answers),
        "num_retries": sum(answer.num_tries - 1 for answer in tally.answers),
        "rows": [vars(row) for row in rows],
        "problems": problems,
    }
    config = {name: getattr(options, name) for name in ("length", "clients", "tasks", "quiet")}
    publish(make_row("chaos", figures, config, options.seed), options.output)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
