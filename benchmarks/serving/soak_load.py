"""The soak's clients: each does one thing after another to a running server, and checks it.

Chats whose answers a program checks, streams that are left, bodies that are refused, adapters that
are loaded, replaced and unloaded. It knows the API only; whatever is not as it should be is noted.
"""

import asyncio
import json
import random
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.demo.demo_tasks import TASKS, check, held_out_examples, messages
from benchmarks.demo.tasks.base import Example
from slora_core.adapters.peft_config import CONFIG_FILE
from slora_core.adapters.peft_weights import WEIGHTS_FILE

EXAMPLES_PER_TASK = 6
# Share of what clients do.
WEIGHTS = {"chat": 10, "leave": 3, "several_prompts": 2, "refused": 3, "load": 1, "replace": 1}
# Bodies that are refused, and with what.
REFUSED: tuple[tuple[str, bytes, int], ...] = (
    ("/v1/completions", b'{"model": "nobody", "prompt": "x"}', 404),
    ("/v1/completions", b'{"model": "date-iso-0", "prompt": ""}', 400),
    ("/v1/chat/completions", b'{"model": "date-iso-0", "messages": [', 400),
    ("/v1/chat/completions", b'{"model": "date-iso-0", "messages": [], "colour": 1}', 400),
    ("/v1/load_lora_adapter", b'{"lora_name": "escape", "lora_path": "../../etc"}', 403),
    ("/v1/load_lora_adapter", b'{"lora_name": "none", "lora_path": "no-such-folder"}', 400),
    ("/v1/unload_lora_adapter", b'{"lora_name": "nobody"}', 404),
)
_JSON = {"Content-Type": "application/json"}


@dataclass
class SoakTally:
    """What the clients did, and what was not as it should be."""

    num_done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class SoakClients:
    """Args:
    adapters: names that are served all the time, each `<task>-<number>`.
    sources: a task's adapter folder, by task.
    scratch: where clients make folders of their own, under an allowed root.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        adapters: Sequence[str],
        sources: dict[str, Path],
        scratch: Path,
        seed: int,
    ) -> None:
        self._http = http
        self._adapters = adapters
        self._sources = sources
        self._scratch = scratch
        self._seed = seed
        self._known: dict[str, list[Example]] = {}
        self.tally = SoakTally()

    async def learn(self) -> None:
        """Ask each task's first adapter; what it answers rightly now it must always."""
        await asyncio.gather(*(self._learn_task(task) for task in TASKS))

    async def _learn_task(self, task: str) -> None:
        examples = held_out_examples(task, EXAMPLES_PER_TASK)
        answers = [await self._ask(f"{task}-0", task, example) for example in examples]
        self._known[task] = [
            example
            for example, text in zip(examples, answers, strict=True)
            if text is not None and check(task, text, example)
        ]
        if not self._known[task]:
            self.tally.problems.append(f"{task}: no example is answered rightly")

    async def run(self, num_clients: int, is_over: Callable[[], bool]) -> None:
        """Keep so many clients at it until it is over."""
        async with asyncio.TaskGroup() as group:
            for number in range(num_clients):
                group.create_task(self._client(number, is_over))

    async def _client(self, number: int, is_over: Callable[[], bool]) -> None:
        draw = random.Random(f"{self._seed}/{number}")
        actions: dict[str, Callable[[random.Random, int], Awaitable[None]]] = {
            "chat": self._chat,
            "leave": self._leave,
            "several_prompts": self._several_prompts,
            "refused": self._refused,
            "load": self._load_and_unload,
            "replace": self._replace,
        }
        while not is_over():
            [name] = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
            try:
                await actions[name](draw, number)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.tally.problems.append(f"{name}: {error!r}")
            self.tally.num_done[name] += 1

    async def check_all(self) -> None:
        """Every adapter answers as it did at the start."""
        for index, name in enumerate(self._adapters):
            task = name.rpartition("-")[0]
            known = self._known[task]
            await self._expect_right(name, task, known[index % len(known)])

    async def _chat(self, draw: random.Random, number: int) -> None:
        # By a power law: some adapters stay in the pool, most come and go.
        name = self._adapters[int(len(self._adapters) * draw.random() ** 2)]
        task = name.rpartition("-")[0]
        await self._expect_right(name, task, draw.choice(self._known[task]), draw.random() < 0.5)

    async def _leave(self, draw: random.Random, number: int) -> None:
        """Read a piece or two of a long stream, and go."""
        body = {"model": draw.choice(self._adapters), "prompt": "Once upon a time", "stream": True}
        body |= {"max_tokens": 400, "ignore_eos": True, "seed": number}
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            self._expect("leave", response.status_code, 200)
            async with aclosing(response.aiter_lines()) as lines:
                for _ in range(draw.randint(1, 6)):
                    await anext(lines, None)

    async def _several_prompts(self, draw: random.Random, number: int) -> None:
        prompts = [f"{number} and {draw.randint(1, 9)} are"] * draw.randint(1, 4)
        body = {"model": draw.choice(self._adapters), "prompt": prompts, "max_tokens": 12}
        answer = await self._post("/v1/completions", {**body, "stop": ["\n", "."]}, 200)
        if answer is not None and len(answer["choices"]) != len(prompts):
            self.tally.problems.append(f"{len(answer['choices'])} choices of {len(prompts)}")

    async def _refused(self, draw: random.Random, number: int) -> None:
        path, body, status = draw.choice(REFUSED)
        response = await self._http.post(path, content=body, headers=_JSON)
        self._expect(f"{path} {body!r}", response.status_code, status)

    async def _load_and_unload(self, draw: random.Random, number: int) -> None:
        """A name comes, answers and goes."""
        task = draw.choice(list(TASKS))
        name = f"guest-{number}"
        folder = self._make_folder(name, task)
        body = {"lora_name": name, "lora_path": str(folder)}
        await self._post("/v1/load_lora_adapter", body, 200)
        await self._expect_right(name, task, draw.choice(self._known[task]))
        await self._post("/v1/unload_lora_adapter", {"lora_name": name}, 200)
        gone = {"model": name, "prompt": "x", "max_tokens": 1}
        await self._post("/v1/completions", gone, 404)

    async def _replace(self, draw: random.Random, number: int) -> None:
        """A name means another adapter, and after the answer only that one."""
        task = draw.choice(list(TASKS))
        name = f"changing-{number}"
        body = {"lora_name": name, "lora_path": str(self._make_folder(name, task))}
        await self._post("/v1/load_lora_adapter", {**body, "load_inplace": True}, 200)
        await self._expect_right(name, task, draw.choice(self._known[task]))

    def _make_folder(self, name: str, task: str) -> Path:
        """The task's adapter in the client's own folder, in place of what was there."""
        folder = self._scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(self._sources[task] / file, folder / file)
        return folder

    async def _expect_right(
        self, model: str, task: str, example: Example, stream: bool = False
    ) -> None:
        text = await self._ask(model, task, example, stream)
        if text is not None and not check(task, text, example):
            self.tally.problems.append(f"{model} answers {text!r} to {example.prompt!r}")

    async def _ask(
        self, model: str, task: str, example: Example, stream: bool = False
    ) -> str | None:
        body = {"model": model, "messages": messages(example), "temperature": 0}
        body["max_tokens"] = TASKS[task].max_answer_tokens
        if not stream:
            answer = await self._post("/v1/chat/completions", body, 200)
            return None if answer is None else str(answer["choices"][0]["message"]["content"])
        body["stream"] = True
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if not self._expect("stream", response.status_code, 200):
                return None
            return "".join([_text_of(line) async for line in response.aiter_lines()])

    async def _post(self, path: str, body: dict[str, Any], status: int) -> Any:
        response = await self._http.post(path, json=body)
        if self._expect(f"{path} {body}", response.status_code, status, response.text):
            return response.json()
        return None

    def _expect(self, what: str, status: int, expected: int, detail: str = "") -> bool:
        if status != expected:
            self.tally.problems.append(f"{what}: {status}, not {expected}: {detail[:200]}")
        return status == expected


def _text_of(line: str) -> str:
    if not line.startswith("data: {"):
        return ""
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise ValueError(f"the stream ended with {event['error']}")
    return "".join(choice["delta"].get("content", "") for choice in event["choices"])
