"""Measures base and adapter accuracy on held-out examples through a running server.

`python -m benchmarks.demo.eval_demo_adapters --url http://127.0.0.1:8000`. Knows the OpenAI
protocol and the demo tasks, not the server: an adapter is called by its name in `model`, decoding
is greedy.
"""

import argparse
import asyncio
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import httpx

from app.progress import ProgressBar
from benchmarks.demo.demo_tasks import (
    DEFAULT_HELD_OUT_COUNT,
    HELD_OUT_SEED,
    TASKS,
    check,
    held_out_examples,
    messages,
)
from benchmarks.demo.tasks.base import Example
from benchmarks.report import add_output_option, make_row, publish


@dataclass(frozen=True)
class Question:
    """One example, asked of one model."""

    task_name: str
    model: str
    example: Example


@dataclass
class Tally:
    """What became of the questions of one task, asked of one model."""

    num_right: int = 0
    num_tokens: int = 0


class EvaluationError(RuntimeError):
    """The server cannot be asked, or refused a question."""


async def list_models(client: httpx.AsyncClient) -> set[str]:
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise EvaluationError(f"no model list from {client.base_url}: {error!r}") from error
    return {card["id"] for card in response.json()["data"]}


async def ask(client: httpx.AsyncClient, question: Question) -> tuple[bool, int]:
    """Return whether the answer is right, and the number of tokens it took."""
    response = await client.post(
        "/v1/chat/completions",
        json={
            "model": question.model,
            "messages": messages(question.example),
            "temperature": 0,
            "max_tokens": TASKS[question.task_name].max_answer_tokens,
        },
    )
    if response.is_error:
        raise EvaluationError(f"{question.model}: HTTP {response.status_code}: {response.text}")
    body = response.json()
    answer = body["choices"][0]["message"]["content"] or ""
    num_tokens = (body.get("usage") or {}).get("completion_tokens", 0)
    return check(question.task_name, answer, question.example), num_tokens


async def evaluate(
    client: httpx.AsyncClient,
    task_names: list[str],
    base_model: str,
    examples_per_task: int,
    concurrency: int,
) -> list[dict[str, Any]]:
    """Ask every example of base and adapter, at most `concurrency` at a time; a row a task.

    Raises:
        EvaluationError: the server lacks a model, or answers a question with an error.
    """
    missing = {base_model, *task_names} - await list_models(client)
    if missing:
        raise EvaluationError(f"the server does not serve: {', '.join(sorted(missing))}")
    questions = make_questions(task_names, base_model, examples_per_task)
    tallies = await ask_all(client, questions, concurrency)
    return [
        {
            "task": name,
            "num_held_out": examples_per_task,
            "base_accuracy": tallies[name, base_model].num_right / examples_per_task,
            "adapter_accuracy": tallies[name, name].num_right / examples_per_task,
            "base_tokens": tallies[name, base_model].num_tokens,
            "adapter_tokens": tallies[name, name].num_tokens,
        }
        for name in task_names
    ]


def make_questions(
    task_names: list[str], base_model: str, examples_per_task: int
) -> list[Question]:
    """All models' questions mixed, so that a batch in the server holds several adapters."""
    per_task = {name: held_out_examples(name, examples_per_task) for name in task_names}
    return [
        Question(name, model, per_task[name][index])
        for index in range(examples_per_task)
        for name in task_names
        for model in (base_model, name)
    ]


async def ask_all(
    client: httpx.AsyncClient, questions: list[Question], concurrency: int
) -> dict[tuple[str, str], Tally]:
    """Ask everything, `concurrency` at a time; a tally by task and model.

    Raises:
        EvaluationError: the server answers a question with an error; the rest is not asked.
    """
    tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)
    limit = asyncio.Semaphore(concurrency)

    async def run(question: Question) -> None:
        async with limit:
            is_right, num_tokens = await ask(client, question)
        tally = tallies[question.task_name, question.model]
        tally.num_right += is_right
        tally.num_tokens += num_tokens
        bar.update()

    total = len(questions)
    with ProgressBar(total=total, desc="asking held-out examples", unit="request") as bar:
        # A group, so that the first error stops the rest at once.
        try:
            async with asyncio.TaskGroup() as group:
                for question in questions:
                    group.create_task(run(question))
        except ExceptionGroup as errors:
            # Not `except*`, which may wrap in a group again what is raised in it.
            first = errors.exceptions[0]
            if isinstance(first, EvaluationError):
                raise first from None
            if isinstance(first, httpx.HTTPError):
                raise EvaluationError(f"request failed: {first!r}") from None
            raise
    return tallies


def print_table(rows: list[dict[str, Any]]) -> None:
    print("\n| adapter | held-out examples | base | adapter |")
    print("|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['task']} | {row['num_held_out']} | {row['base_accuracy']:.1%} "
            f"| {row['adapter_accuracy']:.1%} |"
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--base-model", default="smollm2-135m-instruct")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--examples-per-task", type=int, default=DEFAULT_HELD_OUT_COUNT)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--timeout-s", type=float, default=600.0, help="for one request")
    add_output_option(parser)
    return parser.parse_args()


async def run_against_server(args: argparse.Namespace) -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=args.concurrency)
    async with httpx.AsyncClient(
        base_url=args.url, headers=headers, timeout=args.timeout_s, limits=limits
    ) as client:
        return await evaluate(
            client, args.tasks, args.base_model, args.examples_per_task, args.concurrency
        )


def main() -> None:
    args = parse_args()
    started = time.monotonic()
    try:
        rows = asyncio.run(run_against_server(args))
    except EvaluationError as error:
        sys.exit(f"error: {error}")
    print_table(rows)
    figures = {"wall_s": round(time.monotonic() - started, 1), "rows": rows}
    config = {
        "base_model": args.base_model,
        "examples_per_task": args.examples_per_task,
        "concurrency": args.concurrency,
    }
    publish(make_row("demo_accuracy", figures, config, HELD_OUT_SEED), args.output)


if __name__ == "__main__":
    main()
