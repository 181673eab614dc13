"""What the server around an engine adds to a first token, and how many tokens a second it streams.

`python -m benchmarks.serving.bench_server`: `serve run` of the application with stubbed engines,
two of them and two ingress replicas, by default and with Serve's fast settings, in turn. One client
alone measures the first token, above the stub's own step; then 64 streams at once measure tokens a
second and which process takes the cores. Every text is compared with what the stub was to say.
Server and client share the machine's cores.
"""

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import uvloop

from app.models.demo import ensure_demo_model
from benchmarks.report import add_output_option, make_row, publish
from benchmarks.serving.load_summary import PERCENTILES, percentile
from benchmarks.serving.local_server import READY_TIMEOUT_S
from benchmarks.serving.process_usage import cpu_shares, machine_cpu_s, usage_of_descendants
from benchmarks.serving.raw_client import RawAnswer
from benchmarks.serving.serve_process import serve_run
from benchmarks.serving.stub_load import (
    SHORT_ANSWER,
    Checker,
    Prompt,
    ask_at_once,
    ask_in_turn,
    first_length,
    make_prompts,
)
from slora_core.text.tokenizer import Tokenizer

# Serve reads them where it starts, in each of its processes.
SETTINGS = {
    "default": {},
    # Without HAProxy: Serve's own threads beside the application's are gone.
    "one-loop": {
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    },
    "fast": {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Else a stop takes half a minute.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    },
}
NUM_REPLICAS = 2
WARM_UP_S = 3.0
NUM_WARM_UPS = 20
# A process that takes less of a core is not told.
LEAST_SHARE = 0.02
PORT = 8000


async def warm_up(url: str, prompts: Sequence[Prompt], num_tokens: int) -> None:
    """Until the server has answered for a while; HAProxy cuts connections while replicas start."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            await ask_at_once(url, prompts, num_tokens, WARM_UP_S)
            await ask_in_turn(url, prompts, NUM_WARM_UPS)
            return
        except ConnectionError:
            if time.monotonic() > deadline:
                raise


async def measure(
    url: str, pid: int, args: argparse.Namespace, prompts: Sequence[Prompt], checker: Checker
) -> dict[str, Any]:
    """Figures of a server that has just started."""
    await warm_up(url, prompts, args.tokens)
    meter = CoreMeter(pid)
    alone = await ask_in_turn(url, prompts, args.requests)
    alone_cores = meter.read()
    meter = CoreMeter(pid)
    by_prompt = await ask_at_once(url, prompts, args.tokens, args.seconds)
    cores = meter.read()
    for index, answer in enumerate(alone):
        checker.num_pieces(prompts[index % len(prompts)], SHORT_ANSWER, [answer])
    num_pieces = num_tokens = 0
    for index, (prompt, answers) in enumerate(zip(prompts, by_prompt, strict=True)):
        first = first_length(index, args.streams, args.tokens)
        num_pieces += checker.num_pieces(prompt, first, answers[:1])
        num_pieces += checker.num_pieces(prompt, args.tokens, answers[1:])
        num_tokens += first + args.tokens * (len(answers) - 1)
    # The first ones all came at once.
    later = [answer for answers in by_prompt for answer in answers[1:]]
    return {
        "added_ttft_ms": _added_ms(alone, args.step_ms),
        "tokens_per_s": round(num_tokens / meter.seconds, 1),
        "engine_tokens_per_s": round(args.streams * 1e3 / args.step_ms, 1),
        "tokens_per_piece": round(num_tokens / num_pieces, 2),
        "busy_added_ttft_ms": _added_ms(later, args.step_ms),
        "num_answers": len(alone) + args.streams + len(later),
        "cores": cores,
        "alone_cores": alone_cores,
    }


class CoreMeter:
    """Cores that a server's processes, this one and all others take from now on, by role."""

    def __init__(self, server_pid: int) -> None:
        self._server_pid = server_pid
        self._first = usage_of_descendants(server_pid)
        self._began = time.monotonic()
        self._own_s, self._machine_s = time.process_time(), machine_cpu_s()
        # Once it was read.
        self.seconds = 0.0

    def read(self) -> dict[str, float]:
        self.seconds = time.monotonic() - self._began
        shares = cpu_shares(self._first, usage_of_descendants(self._server_pid), self.seconds)
        shares.append(("client", (time.process_time() - self._own_s) / self.seconds))
        known = sum(share for _, share in shares)
        machine = (machine_cpu_s() - self._machine_s) / self.seconds
        cores: Counter[str] = Counter()
        for role, share in [*shares, ("others", machine - known)]:
            cores[role] += share
        told = {"client", "others"}
        return {
            role: round(share, 2)
            for role, share in cores.most_common()
            if share >= LEAST_SHARE or role in told
        }


def _added_ms(answers: Sequence[RawAnswer], step_ms: float) -> dict[str, float]:
    times = [1e3 * (a.first_at - a.sent_at) - step_ms for a in answers if a.first_at is not None]
    return {f"p{percent}": round(percentile(times, percent) or 0.0, 2) for percent in PERCENTILES}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=3, help="of all settings, in turn")
    parser.add_argument("--streams", type=int, default=64, help="at once")
    parser.add_argument("--step-ms", type=float, default=4.0, help="what a step of a stub takes")
    parser.add_argument("--tokens", type=int, default=256, help="of a stream")
    parser.add_argument("--requests", type=int, default=200, help="of the client alone")
    parser.add_argument("--seconds", type=float, default=15.0, help="of all streams at once")
    parser.add_argument("--port", type=int, default=PORT)
    add_output_option(parser)
    args = parser.parse_args(argv)
    tokenizer = Tokenizer(ensure_demo_model())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        _measure_all(runner, args, tokenizer)


def _measure_all(runner: asyncio.Runner, args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    prompts = runner.run(make_prompts(tokenizer, args.streams, args.tokens))
    app_args = {
        "num_replicas": NUM_REPLICAS,
        "num_ingress_replicas": NUM_REPLICAS,
        "stub_step_s": args.step_ms / 1e3,
    }
    for _ in range(args.repeats):
        for setting in args.settings:
            environment = SETTINGS[setting]
            server = serve_run(
                "benchmarks.serving.stub_app:build", app_args, args.port, environment
            )
            with server as (url, pid):
                figures = runner.run(measure(url, pid, args, prompts, Checker(tokenizer)))
            config = {
                **app_args,
                "environment": environment,
                "streams": args.streams,
                "tokens": args.tokens,
            }
            publish(make_row("server", {"setting": setting, **figures}, config, 0), args.output)


if __name__ == "__main__":
    main()
