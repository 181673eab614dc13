"""What a soak calls grown, and that its clients note what a server does wrong."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from benchmarks.demo.demo_tasks import TASKS, held_out_examples
from benchmarks.serving.process_usage import Growth, Usage
from benchmarks.serving.soak import Sample, ended, grown, growths, parse_args, windows
from benchmarks.serving.soak_load import EXAMPLES_PER_TASK, SoakClients

ROOT = Path(__file__).resolve().parents[3]
SOURCES = {task: ROOT / "serve_configs" / "adapters" / task for task in TASKS}
CONFIGS = {task: (source / "adapter_config.json").read_bytes() for task, source in SOURCES.items()}
ANSWERS = {
    task: {example.prompt: example.answer for example in held_out_examples(task, EXAMPLES_PER_TASK)}
    for task in TASKS
}


def samples(*points):
    """Samples of (second, MiB of process 1, pages)."""
    return [
        Sample(at_s, {1: Usage("slora_core.engine.main", mib * 2**20, 0, 9, 1.0)}, {"pages": pages})
        for at_s, mib, pages in points
    ]


def test_windows_lie_after_the_settling_and_at_the_end():
    taken = samples(*((second, 1, 1) for second in range(0, 100, 5)))
    first, last = windows(taken, 20)
    assert [s.at_s for s in first] == [20, 25, 30, 35, 40, 45]
    assert [s.at_s for s in last] == [70, 75, 80, 85, 90, 95]
    with pytest.raises(ValueError, match="95 s, too short for 95"):
        windows(taken, 95)


def test_growth_is_told_beyond_the_limits():
    taken = samples((0, 50, 0), (1, 100, 7), (2, 100, 5), (8, 103, 6), (9, 103, 4))
    memory, descriptors, counts = growths(taken[1:3], taken[3:])
    assert counts == [Growth("pages", 7, 6)]
    assert grown(memory, descriptors, counts, 8) == [
        "slora_core.engine.main 1 grew from 100 to 103 MiB, 3.0%"
    ]
    assert grown([], [Growth("engine 1", 9, 18)], [], 8) == [
        "engine 1 has 18 descriptors where it had 9"
    ]
    assert grown([], [], [Growth("pages", 100, 109), Growth("leases", 8, 16)], 8) == [
        "pages grew from 100 to 109, 9.0%"
    ]
    assert grown([Growth("engine 1", 100, 101.9)], [Growth("engine 1", 9, 17)], counts, 8) == []


@pytest.mark.parametrize(
    ("name", "last", "is_told"),
    [
        ("ServeReplica:slora:registry 1", 102.1, True),
        ("AdapterStoreActor 1", 101.9, False),
        ("raylet 1", 103.9, False),
        ("raylet 1", 104.1, True),
    ],
)
def test_rays_own_processes_grow_by_themselves(name, last, is_told):
    assert bool(grown([Growth(name, 100, last)], [], [], 8)) == is_told


def test_a_process_that_ends_is_told():
    first, last = samples((0, 1, 1), (1, 1, 1))
    assert ended([first], [last]) == []
    gone = Sample(1, {}, {})
    assert ended([first], [gone]) == ["slora_core.engine.main 1 ended"]


def test_fewer_adapters_than_tasks_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--num-adapters", "4"])
    assert "--num-adapters is 4; it must be 5 or more" in capsys.readouterr().err


class Server:
    """Answers as the API does, by the demo's own solutions; `wrong` says what it does badly."""

    def __init__(self, wrong=None):
        self.wrong = wrong
        self.loaded = {f"{task}-0": task for task in TASKS}
        self.num_asked = 0

    async def __call__(self, request):
        path = request.url.path.removeprefix("/v1/")
        try:
            body = json.loads(request.content)
        except ValueError:
            return httpx.Response(400)
        if path == "load_lora_adapter":
            return self.load(body)
        if path == "unload_lora_adapter":
            found = self.loaded.pop(body["lora_name"], None)
            return httpx.Response(200 if found else 404, json={})
        if body["model"] not in self.loaded:
            return httpx.Response(404, json={})
        if not (body.get("prompt") or body.get("messages")):
            return httpx.Response(400)
        self.num_asked += 1
        return self.answer(body)

    def load(self, body):
        path = Path(body["lora_path"])
        if ".." in path.parts:
            return httpx.Response(403)
        if not path.is_dir():
            return httpx.Response(400)
        if self.wrong != "old version":
            config = (path / "adapter_config.json").read_bytes()
            [task] = [task for task in TASKS if CONFIGS[task] == config]
            self.loaded[body["lora_name"]] = task
        else:
            self.loaded.setdefault(body["lora_name"], "date-iso")
        return httpx.Response(200, json={})

    def answer(self, body):
        if "prompt" in body:
            prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
            choices = [{"text": ""}] * (len(prompts) - (self.wrong == "lost choice"))
            if not body.get("stream"):
                return httpx.Response(200, json={"choices": choices})
            return httpx.Response(200, text="data: {}\n\n" * 8)
        prompt = body["messages"][0]["content"]
        # An adapter solves its own task and no other.
        text = ANSWERS[self.loaded[body["model"]]].get(prompt, "?")
        if self.wrong == "late" and self.num_asked > EXAMPLES_PER_TASK * len(TASKS):
            text = "I do not know"
        if not body.get("stream"):
            return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})
        events = [{"choices": [{"delta": {"content": text}}]}, {"choices": []}]
        if self.wrong == "error event":
            events.append({"error": {"message": "the engine ended"}})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        return httpx.Response(200, text="".join(lines) + "data: [DONE]\n\n")


def soak_of(server, tmp_path, num_actions=60):
    """The clients' tally after so many actions of each of two clients."""

    async def run():
        transport = httpx.MockTransport(server)
        async with httpx.AsyncClient(base_url="http://server", transport=transport) as http:
            names = [f"{task}-0" for task in TASKS]
            clients = SoakClients(http, names, SOURCES, tmp_path, seed=0)
            await clients.learn()

            def is_over():
                return clients.tally.num_done.total() >= 2 * num_actions

            await clients.run(2, is_over)
            await clients.check_all()
            return clients.tally

    return asyncio.run(run())


def test_a_right_server_gives_no_problem(tmp_path):
    tally = soak_of(Server(), tmp_path)
    assert tally.problems == []
    assert set(tally.num_done) == {
        "chat", "leave", "several_prompts", "refused", "load", "replace"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("lost choice", "choices of"),
        ("late", "answers 'I do not know' to"),
        ("error event", "the engine ended"),
        ("old version", "changing-"),
    ],
)
def test_what_is_wrong_is_noted(wrong, told, tmp_path):
    problems = soak_of(Server(wrong), tmp_path).problems
    assert any(told in problem for problem in problems), problems


def test_a_task_that_nothing_solves_is_noted(tmp_path):
    server = Server()
    server.loaded["shop-sql-0"] = "date-iso"
    tally_problems = []

    async def learn():
        transport = httpx.MockTransport(server)
        async with httpx.AsyncClient(base_url="http://server", transport=transport) as http:
            clients = SoakClients(http, [], SOURCES, tmp_path, seed=0)
            await clients.learn()
            tally_problems.extend(clients.tally.problems)

    asyncio.run(learn())
    assert tally_problems == ["shop-sql: no example is answered rightly"]
