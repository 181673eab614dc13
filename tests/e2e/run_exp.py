"""Asks a running server the demo's held-out examples and checks the answers.

`python run_exp.py`, from this folder, beside `launch_server.py`. All tasks at once, adapters and
the base model mixed, every other answer streamed, by the official client. Prints a table and, as
the last line, JSON. The exit status is 1 where an adapter or the base is not what it should be.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The packages, from wherever this is called.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import asyncio
import time
from dataclasses import dataclass
from typing import Any

import openai

from app.args import DEMO_MODEL_NAME
from app.progress import ProgressBar
from benchmarks.demo.demo_tasks import HELD_OUT_SEED, TASKS, check, held_out_examples, messages
from benchmarks.demo.tasks.base import Example
from benchmarks.report import add_output_option, make_row, publish

# Adapters were seen at 97.5% and more on 40 examples a task, the base at 0% on 10; the limits leave
# room for chance where fewer are asked.
MIN_ADAPTER_ACCURACY = 0.9
MAX_BASE_ACCURACY = 0.1
REQUEST_TIMEOUT_S = 300.0


@dataclass
class Question:
    """One example, asked of one model in one way; `answer` and `error` are filled in."""

    task: str
    model: str
    example: Example
    stream: bool
    answer: str | None = None
    error: str | None = None
    num_tokens: int = 0

    @property
    def is_right(self) -> bool:
        return self.answer is not None and check(self.task, self.answer, self.example)


def make_questions(num_adapter: int, num_base: int) -> list[Question]:
    """The first held-out examples of each task, the tasks in turn, the base model among them."""
    num_examples = max(num_adapter, num_base)
    examples = {task: held_out_examples(task, num_examples) for task in TASKS}
    questions = []
    for index in range(num_examples):
        for task in TASKS:
            example = examples[task][index]
            for model, count in ((task, num_adapter), (DEMO_MODEL_NAME, num_base)):
                if index < count:
                    questions.append(Question(task, model, example, stream=index % 2 == 0))
    return questions


async def ask(client: openai.AsyncOpenAI, question: Question) -> None:
    options: dict[str, Any] = {
        "model": question.model,
        "messages": messages(question.example),
        "temperature": 0,
        "max_tokens": TASKS[question.task].max_answer_tokens,
    }
    try:
        if question.stream:
            await _ask_streaming(client, options, question)
            return
        answer = await client.chat.completions.create(**options)
        question.answer = answer.choices[0].message.content
        question.num_tokens = answer.usage.completion_tokens
    except openai.OpenAIError as error:
        question.error = repr(error)


async def _ask_streaming(
    client: openai.AsyncOpenAI, options: dict[str, Any], question: Question
) -> None:
    text = ""
    stream = await client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        if chunk.usage is not None:
            question.num_tokens = chunk.usage.completion_tokens
    question.answer = text


async def ask_all(url: str, questions: list[Question], concurrency: int) -> None:
    """Ask everything, `concurrency` at a time."""
    slots = asyncio.Semaphore(concurrency)
    client = openai.AsyncOpenAI(
        api_key="none", base_url=f"{url}/v1", max_retries=0, timeout=REQUEST_TIMEOUT_S
    )
    with ProgressBar(total=len(questions), unit="answer") as bar:

        async def run(question: Question) -> None:
            async with slots:
                await ask(client, question)
            bar.update()

        async with client, asyncio.TaskGroup() as group:
            for question in questions:
                group.create_task(run(question))


def accuracies(questions: list[Question]) -> dict[str, dict[str, float]]:
    """Share of right answers by task, of the adapter and of the base model."""
    result: dict[str, dict[str, float]] = {}
    for task in TASKS:
        for label, is_base in (("base", True), ("adapter", False)):
            right = [
                question.is_right
                for question in questions
                if question.task == task and (question.model == DEMO_MODEL_NAME) == is_base
            ]
            if right:
                result.setdefault(task, {})[label] = sum(right) / len(right)
    return result


def failures(result: dict[str, dict[str, float]], questions: list[Question]) -> list[str]:
    """What is not as it should be, in words."""
    found = [f"{q.model} on {q.task}: {q.error}" for q in questions if q.error is not None]
    for task, shares in result.items():
        if shares.get("adapter", 1.0) < MIN_ADAPTER_ACCURACY:
            found.append(f"{task}: {shares['adapter']:.1%} is under {MIN_ADAPTER_ACCURACY:.0%}")
        if shares.get("base", 0.0) > MAX_BASE_ACCURACY:
            found.append(f"{task}: the base's {shares['base']:.1%} is over {MAX_BASE_ACCURACY:.0%}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--examples", type=int, default=40, help="a task, asked of its adapter")
    parser.add_argument("--base-examples", type=int, default=10, help="a task, asked of the base")
    parser.add_argument("--concurrency", type=int, default=16)
    add_output_option(parser)
    options = parser.parse_args()
    questions = make_questions(options.examples, options.base_examples)
    started = time.monotonic()
    asyncio.run(ask_all(options.url, questions, options.concurrency))
    wall_s = time.monotonic() - started
    result = accuracies(questions)
    problems = failures(result, questions)
    for task, shares in result.items():
        print(f"{task:<16}" + "".join(f"{name} {share:>7.1%}   " for name, share in shares.items()))
    print(f"{len(questions)} answers in {wall_s:.1f} s")
    for problem in problems[:10]:
        print(f"  wrong: {problem}")
    figures = {
        "accuracy": result,
        "num_questions": len(questions),
        "num_answered": sum(question.answer is not None for question in questions),
        "num_output_tokens": sum(question.num_tokens for question in questions),
        "wall_s": round(wall_s, 3),
        "problems": problems,
    }
    config = {
        "examples": options.examples,
        "base_examples": options.base_examples,
        "concurrency": options.concurrency,
    }
    publish(make_row("e2e_answers", figures, config, HELD_OUT_SEED), options.output)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
