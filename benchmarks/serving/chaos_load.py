"""The chaos run's clients: each asks for one known text after another, and compares it.

They know the API only. A client whose connection breaks, or that is told of an error, tries once
more, as any client would; what was not as it should be then is noted.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

# How often all texts are computed at once, in batches that differ.
NUM_CROWDS = 3


@dataclass(frozen=True)
class Task:
    """One request, whose text is known."""

    model: str
    body: dict[str, Any]
    text: str = ""


@dataclass(frozen=True)
class Answer:
    """A request that was answered, at whichever try."""

    started_at: float
    ended_at: float
    num_tries: int
    # Between two events of its stream, or of a whole answer to its end: the longest, and its begin.
    longest_gap_s: float
    gap_began_at: float


@dataclass
class Tally:
    answers: list[Answer] = field(default_factory=list)
    # Tries that failed, with the reason; a request whose second one does is lost.
    failures: list[tuple[float, str]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class AnswerError(Exception):
    """A try that gave no whole answer."""


class ChaosClients:
    """Args:
    url: of the server.
    tasks: what is asked, in random order.
    """

    def __init__(self, url: str, tasks: Sequence[Task], seed: int) -> None:
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=180,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        self._tasks = tasks
        self._seed = seed
        self.tally = Tally()

    async def learn(self) -> int:
        """Have every task's text computed while nothing disturbs it.

        One after another, then all at once: a text that differs hangs on the last bits of a logit,
        which depend on the batch, and would differ without any kill too. Returns how many do; they
        are not asked any more.
        """
        alone = [(await self._ask(task))[0] for task in self._tasks]
        steady = dict(enumerate(alone))
        for _ in range(NUM_CROWDS):
            crowd = await asyncio.gather(*(self._ask(task) for task in self._tasks))
            for index, (text, _) in enumerate(crowd):
                if text != alone[index]:
                    steady.pop(index, None)
        num_unsteady = len(self._tasks) - len(steady)
        self._tasks = [replace(self._tasks[index], text=text) for index, text in steady.items()]
        return num_unsteady

    async def close(self) -> None:
        await self._http.aclose()

    async def run(self, num_clients: int, is_over: Callable[[], bool]) -> None:
        """Keep so many clients at it until it is over."""
        async with asyncio.TaskGroup() as group:
            for number in range(num_clients):
                group.create_task(self._client(random.Random(f"{self._seed}/{number}"), is_over))

    async def _client(self, draw: random.Random, is_over: Callable[[], bool]) -> None:
        while not is_over():
            task = draw.choice(self._tasks)
            started_at = time.monotonic()
            for num_tries in (1, 2):
                try:
                    text, (gap_s, gap_began_at) = await self._ask(task)
                except (httpx.HTTPError, AnswerError) as error:
                    self.tally.failures.append((time.monotonic(), f"{task.model}: {error!r}"))
                    await asyncio.sleep(draw.uniform(0.5, 1.0))
                    continue
                if text != task.text:
                    self.tally.wrong.append(f"{task.model}, {task.body}: {text!r}")
                ended_at = time.monotonic()
                self.tally.answers.append(
                    Answer(started_at, ended_at, num_tries, gap_s, gap_began_at)
                )
                break
            else:
                self.tally.lost.append(f"{task.model}: {self.tally.failures[-1][1]}")

    async def _ask(self, task: Task) -> tuple[str, tuple[float, float]]:
        """The text, the longest time in which nothing came, and when that began."""
        body = {"model": task.model, **task.body}
        last_at = time.monotonic()
        if not body["stream"]:
            answer = await self._http.post("/v1/completions", json=body)
            if answer.status_code != 200:
                raise AnswerError(f"{answer.status_code}: {answer.text[:300]}")
            text = answer.json()["choices"][0]["text"]
            return text, (time.monotonic() - last_at, last_at)
        gap = (0.0, last_at)
        parts = []
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise AnswerError(f"{response.status_code}: {(await response.aread())[:300]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                now = time.monotonic()
                gap, last_at = max(gap, (now - last_at, last_at)), now
                if line == "data: [DONE]":
                    return "".join(parts), gap
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise AnswerError(f"in the stream: {event['error']}")
                parts.append(event["choices"][0]["text"])
        raise AnswerError("the stream ended without its end")
