"""One small replica on a real Ray cluster: overload, and the death of each actor."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.app.api_errors import error_of
from tests.app.ray_actors import kill_named_actor
from tests.app.serve_app import ADAPTERS, BASE, running_app, wait_until
from tests.factories import make_random_adapter

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def app(ray_cluster, tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    with running_app(
        ray_cluster, root, "small", "/small", max_ongoing_requests=1, max_queued_requests=1
    ) as app:
        yield app


def test_overload_is_refused_at_once(app):
    with app.stream() as running, ThreadPoolExecutor(6) as pool:
        # Kept: httpx closes a response whose iterator is dropped.
        lines = running.iter_lines()
        next(lines)
        # One runs, one waits, the others are refused.
        responses = list(pool.map(lambda _: app.complete(max_tokens=1), range(6)))
        # Overload is no illness.
        assert app.is_healthy()
    refused = [response for response in responses if response.status_code != 200]
    assert len(responses) > len(refused) >= 1
    for response in refused:
        assert "overloaded" in error_of(response, 503)["message"]
        assert int(response.headers["retry-after"]) > 0
    assert app.complete().status_code == 200


def test_unload_frees_an_adapter_that_a_waiting_request_uses_once_more(app):
    path = make_random_adapter(app.extra_dir / "leaving", app.model, seed=8)
    resident = app.resident()
    assert app.load("leaving", path).status_code == 200
    with ThreadPoolExecutor(1) as pool, app.stream("leaving") as running:
        lines = running.iter_lines()
        next(lines)
        waiting = pool.submit(app.complete, "leaving")
        # Its name is looked up before it waits for room in the engine.
        time.sleep(0.5)
        assert app.unload("leaving").status_code == 200
        assert not waiting.done()
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert waiting.result().status_code == 200
    wait_until(lambda: app.resident() <= resident, timeout_s=5)


@pytest.mark.parametrize("victim", ["engine_pid", "replica_pid"])
def test_death_of_the_only_engine(app, victim):
    """What runs goes on in its replacement, and what comes meanwhile waits for it."""
    fields = {"model": ADAPTERS[0], "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    expected = app.complete(**fields).json()["choices"][0]["text"]
    with app.stream(**fields) as running, ThreadPoolExecutor(1) as pool:
        lines = running.iter_lines()
        first = next(lines)
        os.kill(app.stats()[0][victim], signal.SIGKILL)
        later = pool.submit(app.complete, max_tokens=1)
        rest = [line for line in lines if line and not line.startswith(":")]
    assert rest.pop() == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in (first, *rest)]
    assert "".join(event["choices"][0]["text"] for event in events) == expected
    assert later.result().status_code == 200
    wait_until(app.is_healthy, timeout_s=10)


def test_death_of_registry_and_store(app):
    path = make_random_adapter(app.extra_dir / "kept", app.model, seed=7)
    assert app.load("kept", path).status_code == 200
    text = app.complete("kept").json()["choices"][0]["text"]
    for actor in ("SERVE_REPLICA::small#registry#", "adapter-store:small:"):
        kill_named_actor(actor)
        # Names are resolved here and adapters run from the pool meanwhile.
        assert app.complete(BASE).status_code == 200
    wait_until(lambda: app.complete("kept").json()["choices"][0]["text"] == text, timeout_s=30)
    assert app.unload("kept").status_code == 200
    assert "kept" not in app.names()
    assert set(ADAPTERS) <= set(app.names())
