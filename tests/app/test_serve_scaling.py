"""An application on a real Ray cluster that grows with its load and shrinks after it."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.routing.order import homes
from tests.app.serve_app import ADAPTERS, BASE, running_app, wait_until

pytestmark = pytest.mark.serve

NUM_STREAMS = 4


@pytest.fixture(scope="module")
def app(ray_cluster, tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    settings = {
        "max_replicas": 2,
        "target_requests": 3,
        "scale_up_delay_s": 0,
        "scale_down_delay_s": 2,
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

    def ask():
        while not stop.is_set():
            statuses.add(app.complete(max_tokens=100, ignore_eos=True).status_code)

    with ThreadPoolExecutor(4 + NUM_STREAMS) as pool:
        for _ in range(4):
            pool.submit(ask)
        try:
            app.wait_replicas(2)
            # It has the adapters that it will be asked for, and nobody has asked it yet.
            by_id = {stats["replica_id"]: stats for stats in app.stats()}
            [second] = [by_id[replica_id] for replica_id in by_id.keys() - {first["replica_id"]}]
            own = {key for key in adapter_ids if homes(key, 1, ["0", "1"]) == [1]}
            assert second["rank_in_deployment"] == "1" and len(own) > 1
            assert set(second["resident_adapters"]) == own
            # Longer than it takes to notice that two replicas are too many, and on both.
            streams = [pool.submit(_read_stream, app) for _ in range(NUM_STREAMS)]
            wait_until(lambda: all(stats["num_running"] for stats in app.stats()), timeout_s=10)
        finally:
            stop.set()
        assert [stream.result() for stream in streams] == ["length"] * NUM_STREAMS
    assert statuses == {200}
    app.wait_replicas(1)
    assert app.complete(BASE).status_code == 200


def _read_stream(app):
    """A long stream; the reason for its end."""
    with app.stream() as response:
        *_, last, done = [line for line in response.iter_lines() if line]
    assert done == "data: [DONE]"
    return json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"]
