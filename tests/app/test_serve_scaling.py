"""An application on a real Ray cluster that grows with its load and shrinks after it."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.routing.order import homes
from tests.app.serve_app import ADAPTERS, BASE, running_app, wait_until

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def app(ray_cluster, tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    settings = {
        "max_replicas": 2,
        "target_requests": 4,
        "scale_up_delay_s": 0,
        "scale_down_delay_s": 0.5,
        "autoscaling_window_s": 1,
        "autoscaling_report_s": 0.2,
    }
    with running_app(ray_cluster, root, "scaling", "/scaling", **settings) as app:
        yield app


def test_a_second_replica_comes_with_the_load_and_goes_without_losing_a_stream(app):
    for name in ADAPTERS:
        assert app.complete(name).status_code == 200
    [first] = app.stats()
    adapter_ids = set(first["resident_adapters"])
    assert len(adapter_ids) == len(ADAPTERS)

    stop, statuses = threading.Event(), set()

    def ask(number):
        while not stop.is_set():
            prompt = f"{number} is what this prompt has of its own"
            answer = app.complete(prompt=prompt, max_tokens=200, ignore_eos=True)
            statuses.add(answer.status_code)

    with ThreadPoolExecutor(10) as pool:
        for number in range(10):
            pool.submit(ask, number)
        try:
            app.wait_replicas(2)
            # It has the adapters that it will be asked for, and nobody has asked it yet.
            [second] = [
                stats for stats in app.stats() if stats["replica_id"] != first["replica_id"]
            ]
            own = {key for key in adapter_ids if homes(key, 1, ["0", "1"]) == [1]}
            assert second["rank_in_deployment"] == "1" and len(own) > 1
            assert set(second["resident_adapters"]) == own

            def have_both_some():
                return all(stats["num_running"] > 0 for stats in app.stats())

            wait_until(have_both_some, timeout_s=10)
            streams = [pool.submit(_read_stream, app, number) for number in range(4)]
        finally:
            stop.set()
        assert [stream.result() for stream in streams] == ["length"] * 4
    assert statuses == {200}
    app.wait_replicas(1)
    assert app.complete(BASE).status_code == 200


def _read_stream(app, number):
    """A long stream; the reason for its end."""
    prompt = f"{number} is what this stream has of its own"
    with app.stream(prompt=prompt, max_tokens=1900) as response:
        *_, last, done = [line for line in response.iter_lines() if line]
    assert done == "data: [DONE]"
    return json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"]
