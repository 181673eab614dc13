"""S-LoRA's client command: a seeded open-loop trace over HTTP, and its figures.

`python run_exp.py --debug --model-setting Real`, from this folder, beside `launch_server.py` with
the same setting. Prints a table and, as the last line, JSON. The exit status is 1 where a request
was lost, 2 where the server is not the right one.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The packages, and not this folder, whose trace.py would hide Python's own.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import httpx

from app.progress import ProgressBar
from benchmarks.report import add_output_option, make_row, publish
from benchmarks.serving.load_generator import (
    LoadGenerator,
    LoadLimits,
    PlannedRequest,
    RequestRecord,
)
from benchmarks.serving.load_summary import DEFAULT_SLO_S, summarize, table
from benchmarks.serving.server_files import numbered_order
from benchmarks.serving.settings import SETTINGS, Setting
from benchmarks.serving.trace import POPULARITIES, TraceConfig, TraceRequest, make_trace

EXIT_LOST = 1
EXIT_WRONG_SERVER = 2


class WrongServerError(RuntimeError):
    """Nobody answers, or somebody who serves something else."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-setting", choices=list(SETTINGS), default="Real")
    parser.add_argument("--debug", action="store_true", help="the setting's short run")
    parser.add_argument("--dummy", action="store_true", help="the server has random weights")
    parser.add_argument("--num-adapter", type=int, help="adapters to ask (default: all served)")
    parser.add_argument("--rate", type=float, help="requests a second (default: the setting's)")
    parser.add_argument("--duration", type=float, help="seconds of arrivals")
    parser.add_argument(
        "--at-once", action="store_true", help="send rate x duration requests at the start"
    )
    parser.add_argument("--popularity", choices=POPULARITIES, default="power")
    parser.add_argument(
        "--alpha", type=float, default=1.0, help="of the power law; 1 is uniform, less is skewed"
    )
    parser.add_argument("--cv", type=float, default=1.0, help="of arrivals; 1 is Poisson")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--slo", type=float, default=DEFAULT_SLO_S, help="first token, seconds")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a request may take")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    add_output_option(parser)
    return parser.parse_args(argv)


def served_adapters(url: str, setting: Setting, dummy: bool) -> list[str]:
    """Names of the adapters that the server at `url` has, the sources in turn.

    Raises:
        WrongServerError: no answer, or the base model is not the setting's.
    """
    parents = _parents_of_models(url)
    wanted = setting.served_name(dummy)
    if wanted not in parents:
        bases = ", ".join(name for name, parent in parents.items() if parent is None)
        flag = " --dummy" if dummy else ""
        raise WrongServerError(
            f"--model-setting {setting.name}{flag} needs a server of {wanted}; {url} serves {bases}"
        )
    return numbered_order([name for name, parent in parents.items() if parent == wanted])


def _parents_of_models(url: str) -> dict[str, str | None]:
    try:
        response = httpx.get(f"{url}/v1/models", timeout=10.0, trust_env=False)
        cards = response.raise_for_status().json()["data"]
        return {card["id"]: card.get("parent") for card in cards}
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise WrongServerError(
            f"no list of models from {url} ({error}); start launch_server.py first, or give --url"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WrongServerError(f"{url} is not a server of the OpenAI API") from None


def plan(trace: Sequence[TraceRequest], base: str, adapters: Sequence[str]) -> list[PlannedRequest]:
    """Requests that produce exactly the trace's lengths, whatever the weights say."""
    return [
        PlannedRequest(
            request.due_s,
            {
                "model": base if request.adapter is None else adapters[request.adapter],
                "prompt": list(request.prompt_ids),
                "max_tokens": request.output_len,
                "ignore_eos": True,
                "temperature": 0,
            },
        )
        for request in trace
    ]


class Progress:
    """A bar over requests, with the throughput so far."""

    def __init__(self, num_requests: int) -> None:
        self._bar = ProgressBar(total=num_requests, unit="req")
        self._num_sent = self._num_ended = self._num_tokens = self._num_lost = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def show(self, record: RequestRecord) -> None:
        if record.end_s is None:
            self._num_sent += 1
        else:
            self._num_ended += 1
            self._num_tokens += record.num_output_tokens
            self._num_lost += record.error is not None
            self._bar.update()
        elapsed_s = max(record.end_s or record.sent_s or 0.0, 1e-3)
        self._bar.set_postfix_str(
            f"{self._num_tokens / elapsed_s:.1f} tokens/s, "
            f"{max(0, self._num_sent - self._num_ended)} open, {self._num_lost} not answered"
        )


def run(url: str, requests: Sequence[PlannedRequest], timeout_s: float) -> list[RequestRecord]:
    limits = LoadLimits(request_timeout_s=timeout_s, drain_timeout_s=timeout_s)
    with Progress(len(requests)) as progress:
        return asyncio.run(LoadGenerator(url, limits, progress.show).run(requests))


def trace_config(args: argparse.Namespace, num_served: int) -> TraceConfig:
    """The workload of these arguments.

    Raises:
        ValueError: a value outside its range.
        WrongServerError: fewer adapters are served than asked for.
    """
    num_adapters = num_served if args.num_adapter is None else args.num_adapter
    if num_adapters > num_served:
        raise WrongServerError(f"--num-adapter is {num_adapters}; {num_served} are served")
    return SETTINGS[args.model_setting].trace_config(
        num_adapters,
        args.debug,
        rate=args.rate,
        duration_s=args.duration,
        popularity=args.popularity,
        alpha=args.alpha,
        cv=args.cv,
        at_once=args.at_once,
        seed=args.seed,
    )


def row(
    args: argparse.Namespace, config: TraceConfig, num_served: int, records: list[RequestRecord]
) -> dict[str, Any]:
    """Everything that the JSON line has."""
    settings = {
        "model_setting": args.model_setting,
        "dummy": args.dummy,
        "debug": args.debug,
        "num_adapters_served": num_served,
        "trace": asdict(config),
    }
    return make_row("serving", summarize(records, args.slo), settings, config.seed)


def main() -> None:
    args = parse_args()
    setting = SETTINGS[args.model_setting]
    try:
        adapters = served_adapters(args.url, setting, args.dummy)
        config = trace_config(args, len(adapters))
    except (WrongServerError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_WRONG_SERVER)
    requests = plan(make_trace(config), setting.served_name(args.dummy), adapters)
    records = run(args.url, requests, args.timeout)
    result = row(args, config, len(adapters), records)
    print(table(result))
    for record in [r for r in records if r.error is not None][:3]:
        print(f"  {record.error}: {record.model}: {record.error_detail}")
    publish(result, args.output)
    sys.exit(EXIT_LOST if result["num_errors"] else 0)


if __name__ == "__main__":
    main()
