"""A config that is deployed, changed and deployed again, under streams that must not notice."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.app.serve_app import BASE, RunningApp, wait_until
from tests.factories import make_model, make_random_adapter
from tests.tiny_tokenizer import VOCAB_SIZE, make_tokenizer

pytestmark = pytest.mark.serve

APP = "deployed"
# What a stream of so many tokens takes outlasts every redeployment here.
CONTEXT_LEN = 2**17
MAX_ANSWER_S = 2.0


class Deployed(RunningApp):
    """An application of a config file, as `serve deploy` sends it to the cluster."""

    def deploy(self, **changed) -> None:
        """Give Serve the config with changed arguments; what becomes of it comes later."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        self.args = {**self.args, **changed}
        application = {
            "name": APP,
            "route_prefix": f"/{APP}",
            "import_path": "app.build:build",
            "args": self.args,
        }
        config = ServeDeploySchema.model_validate({"applications": [application]})
        _get_global_client().deploy_apps(config, _blocking=False)

    def failure(self) -> str:
        """Why the last config was refused; nothing where it was not."""
        from ray import serve

        status = serve.status().applications[APP]
        return status.message if status.status == "DEPLOY_FAILED" else ""

    def replicas(self) -> dict[str, dict[int, str]]:
        """The state of each replica by its process, by deployment."""
        import ray
        from ray.serve.context import _get_global_client

        details = ray.get(_get_global_client()._controller.get_serve_instance_details.remote())
        deployments = details["applications"][APP]["deployments"]
        return {
            name: {replica["pid"]: replica["state"] for replica in deployment["replicas"]}
            for name, deployment in deployments.items()
        }

    def running(self) -> dict[str, set[int]]:
        return {
            name: {pid for pid, state in replicas.items() if state == "RUNNING"}
            for name, replicas in self.replicas().items()
        }


@pytest.fixture(scope="module")
def app(ray_cluster, tmp_path_factory) -> Iterator[Deployed]:
    from ray import serve

    root = tmp_path_factory.mktemp("deploy")
    shape = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": CONTEXT_LEN}
    model = make_tokenizer(make_model(root / "model", num_hidden_layers=1, **shape))
    for directory, name, seed in (("old", "both", 1), ("old", "gone", 2), ("new", "both", 3)):
        make_random_adapter(root / directory / name, model, seed=seed)
    app = Deployed(f"{ray_cluster}/{APP}", model, root / "old", root / "new", APP)
    app.args = {
        "model": str(model),
        "served_model_name": BASE,
        "adapters_dir": str(root / "old"),
        "num_pool_tokens": 3 * CONTEXT_LEN,
        "cpus_per_replica": 0.1,
        "num_threads": 1,
        "max_surge_percent": 100,
        "store_capacity_bytes": 2**26,
        "store_extent_bytes": 2**24,
        "packed_cache_dir": str(root / "packed"),
        # The streams leave the cores to what starts beside them.
        "max_pieces_per_s": 20.0,
    }
    app.deploy()
    wait_until(app.is_healthy, 60)
    yield app
    serve.delete(APP)


@contextmanager
def watched(app: Deployed) -> Iterator[list[float]]:
    """How long each answer of /v1/models takes meanwhile, which must be one."""
    took: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.wait(0.05):
                began_at = time.monotonic()
                for path in ("/v1/models", "/health"):
                    status = client.get(f"{app.url}{path}").status_code
                    took.append(time.monotonic() - began_at if status == 200 else float("inf"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield took
    finally:
        stop.set()
        watcher.join()


def last_event(lines: Iterator[str]) -> dict:
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    return json.loads(events[-2])


def test_what_must_be_replaced_rolls_while_its_streams_go_on(app):
    before = app.running()

    def are_replaced(now: dict[str, set[int]]) -> bool:
        return all(now[name] and not now[name] & before[name] for name in ("engine", "ingress"))

    with watched(app) as took, app.stream(max_tokens=CONTEXT_LEN - 100) as long:
        lines = long.iter_lines()
        next(lines)
        # Of the engine and the ingress.
        app.deploy(max_model_len=CONTEXT_LEN - 1)
        wait_until(lambda: are_replaced(app.running()), 60)
        after = app.running()
        assert after["registry"] == before["registry"]
        assert (len(after["engine"]), len(after["ingress"])) == (1, 1)
        assert app.complete("gone", max_tokens=4).status_code == 200
        # The old ones are there for as long as their stream is.
        assert before["ingress"] <= set(app.replicas()["ingress"])
        assert json.loads(next(filter(None, lines)).removeprefix("data: "))["choices"]
    assert max(took) < MAX_ANSWER_S


def test_a_changed_config_replaces_nothing_that_can_change_in_place(app):
    before = app.running()
    with (
        watched(app) as took,
        app.stream("gone", max_tokens=CONTEXT_LEN - 100) as long,
        app.stream("both", max_tokens=8000, stream_options={"include_usage": True}) as short,
    ):
        lines, short_lines = long.iter_lines(), short.iter_lines()
        next(lines), next(short_lines)
        app.deploy(
            num_replicas=2,
            max_queued_requests=7,
            max_body_bytes=4096,
            adapters_dir=str(app.extra_dir),
        )
        wait_until(lambda: len(app.running()["engine"]) == 2, 60)
        after = app.running()
        assert after["ingress"] == before["ingress"] and after["registry"] == before["registry"]
        assert before["engine"] < after["engine"]
        wait_until(lambda: app.names() == [BASE, "both"], 10)
        assert app.complete("both", max_tokens=4).status_code == 200
        assert app.complete(prompt="a" * 5000).status_code == 413
        # On the adapter that is served no more, and on another version.
        assert json.loads(next(filter(None, lines)).removeprefix("data: "))["choices"]
        assert last_event(short_lines)["usage"]["completion_tokens"] == 8000
    assert max(took) < MAX_ANSWER_S
    assert app.running() == after


def test_a_config_that_is_wrong_changes_nothing(app):
    before = app.running()
    app.deploy(adapters_dir="nowhere")
    wait_until(app.failure, 30)
    assert "exception:\nadapters_dir: nowhere is relative, " in app.failure()
    assert app.complete("both", max_tokens=4).status_code == 200
    # Serve tells of no deployment while there is no config that it could compare them with.
    assert app.running() in ({}, before)
