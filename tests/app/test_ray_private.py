"""The contract of each function of `app.ray_private` with the Ray that is installed."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
APP = "contracts"
MAX_ONGOING_REQUESTS = 2


@contextmanager
def contract(touch):
    """What fails within says which private touch of Ray it was about."""
    try:
        yield
    except Exception as error:
        import ray

        raise AssertionError(
            f"Ray {ray.__version__} may have changed {touch}, which app/ray_private.py uses: "
            f"{error!r}"
        ) from error


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """The file that grows by a byte at each call of the router."""
    path = tmp_path_factory.mktemp("contracts") / "calls"
    path.touch()
    return path


@pytest.fixture(scope="module")
def url(ray_cluster, calls):
    from ray import serve

    from tests.app.ray_contract_app import contract_app

    application = contract_app(calls, max_ongoing_requests=MAX_ONGOING_REQUESTS)
    with contract("__serve_build_asgi_app__ or the pickling of routers"):
        serve.run(application, name=APP, route_prefix="/contracts")
    yield f"{ray_cluster}/contracts"
    serve.delete(APP)


@pytest.fixture
def handle(url):
    from ray import serve

    return serve.get_deployment_handle("replica", APP)


@pytest.fixture
def streams(handle, tmp_path):
    """`streams()` opens one more and gives the pid of its replica; all end with the test."""
    from app.ray_private import stream_by_value

    open_streams = []
    release = tmp_path / "release"

    def open_stream(session_id="a", holding=True):
        args = [str(release)] if holding else []
        stream = stream_by_value(handle, "items", session_id, *args)
        open_streams.append(stream)
        return next(stream)

    yield open_stream
    release.touch()
    for stream in open_streams:
        assert list(stream) == [{"last": True}]


@pytest.mark.serve
def test_items_come_by_value(handle):
    from app.ray_private import stream_by_value

    with contract("the option _by_reference of a handle"):
        stream = stream_by_value(handle, "items", "a")
        assert not stream.by_reference
        pid, last = list(stream)
        assert isinstance(pid, int) and last == {"last": True}


@pytest.mark.serve
def test_calls_of_one_http_request_are_calls_of_their_own(url):
    with contract("the context variable of the current request"):
        answer = (
            httpx.get(f"{url}/streams", params={"num": 12}, timeout=30).raise_for_status().json()
        )
        assert answer == {"counts": [2] * 12, "num_request_ids": 12}


@pytest.mark.serve
def test_the_application_is_built_in_the_replica(url):
    with contract("__serve_build_asgi_app__"):
        answer = httpx.get(f"{url}/greeting", timeout=30).raise_for_status().json()
        assert answer == {"greeting": "hello", "built_here": True}


@pytest.mark.serve
def test_serve_writes_our_log_as_it_is_asked_to(url):
    with contract("the extra log_to_stderr of a record"):
        answer = httpx.get(f"{url}/log", timeout=30).raise_for_status().json()
        ours = [json.loads(line) for line in Path(answer["file"]).read_text().splitlines()]
        both, file = [line for line in ours if line["message"].startswith("for ")]
        assert (both["message"], both["answer_id"]) == ("for both", "cmpl-1")
        assert (file["message"], file["moves"], file["levelname"]) == ("for the file", 2, "INFO")
        assert "for both" in answer["terminal"] and "for the file" not in answer["terminal"]


@pytest.mark.serve
@pytest.mark.parametrize("path", ["greeting", "nowhere"])
def test_serve_writes_the_id_of_a_request_into_its_answer(url, path):
    """Once, so that nothing of ours does; documented, but for the one that it draws."""
    with contract("the header X-Request-ID of answers"):
        given = httpx.get(f"{url}/{path}", headers={"X-Request-Id": "mine"}, timeout=30)
        assert given.headers.get_list("x-request-id") == ["mine"]
        drawn = [httpx.get(f"{url}/{path}", timeout=30).headers["x-request-id"] for _ in "ab"]
        assert len({*drawn}) == 2 and "" not in drawn


@pytest.mark.serve
def test_a_deployment_has_the_version_that_it_was_given(ray_cluster):
    """By the function with which Serve makes all that its controller learns of a deployment."""
    from ray import serve
    from ray.serve._private.config import DeploymentConfig
    from ray.serve._private.deploy_utils import get_deploy_args

    from app.ray_private import with_code_version
    from tests.app.ray_contract_app import Replica

    with contract("DeploymentConfig.version"):
        options = {"num_replicas": 3, "user_config": {"a": 1}, "max_queued_requests": 7}
        given = with_code_version(serve.deployment(Replica).options(**options), "mine")
        # As Serve does it, more options come later.
        bound = given.bind()._bound_deployment.options(name="replica")
        sent = get_deploy_args(
            name=bound.name,
            replica_config=bound._replica_config,
            deployment_config=bound._deployment_config,
            version="of the whole application",
        )
        config = DeploymentConfig.from_proto_bytes(sent["deployment_config_proto_bytes"])
        assert config.version == "mine"
        assert {name: getattr(config, name) for name in options} == options


@pytest.mark.serve
def test_a_handle_needs_no_deployment(url):
    with contract("_check_exists of serve.get_deployment_handle"):
        answer = httpx.get(f"{url}/by_name", timeout=30).raise_for_status().json()
        assert answer == {"deployment": "nowhere"}


@pytest.mark.serve
def test_a_handle_by_name_reaches_its_deployment(url):
    from app.ray_private import handle_by_name, stream_by_value

    with contract("_check_exists of serve.get_deployment_handle"):
        assert len(list(stream_by_value(handle_by_name("replica", APP), "items", "a"))) == 2


@pytest.mark.serve
def test_what_one_process_writes_to_the_cluster_others_read(ray_cluster):
    import ray

    from app.ray_private import read_from_cluster, write_to_cluster

    @ray.remote(num_cpus=0.1)
    def exchange(data):
        before = read_from_cluster("contracts", "a:")
        write_to_cluster("contracts", "a:é", data)
        return before

    with contract("ray.experimental.internal_kv"):
        assert read_from_cluster("contracts", "a:") == {}
        write_to_cluster("contracts", "a:é", b"one")
        write_to_cluster("contracts", "ab:key", b"of another prefix")
        assert ray.get(exchange.remote(b"two"), timeout=30) == {"a:é": b"one"}
        assert read_from_cluster("contracts", "a:") == {"a:é": b"two"}
        assert read_from_cluster("elsewhere", "a:") == {}
        many = {f"a:{number}": bytes([number % 256]) * 1000 for number in range(2000)}
        for key, data in many.items():
            write_to_cluster("contracts", key, data)
        assert read_from_cluster("contracts", "a:") == {"a:é": b"two", **many}


@pytest.mark.serve
def test_a_router_is_told_of_what_it_sends_and_of_its_end(streams):
    """It leaves a replica while that holds a request, and comes back."""
    with contract("RequestRouter.on_send_request"):
        first = streams(holding=False)
        # The router learns of the end a moment later.
        time.sleep(0.2)
        assert streams() == first
        other = streams()
        assert other != first, "the held request was not counted"


@pytest.mark.serve
def test_a_router_is_told_what_replicas_answer(streams, calls):
    with contract("RequestRouter.on_new_queue_len_info"):
        counts = calls.with_name("counts")
        before = len(counts.read_text().split())
        for _ in range(3):
            streams()
        # Each with itself, the third beside the first.
        assert counts.read_text().split()[before:] == ["1", "1", "2"]


@pytest.mark.serve
def test_requests_without_a_replica_hold_up_no_others(handle, streams):
    from app.ray_private import stream_by_value

    with contract("RequestRouter.max_num_routing_tasks"):
        stuck = [stream_by_value(handle, "items", "nowhere") for _ in range(12)]
        try:
            time.sleep(0.5)
            started_at = time.monotonic()
            streams()
            assert time.monotonic() - started_at < 2
        finally:
            for stream in stuck:
                stream.cancel()


@pytest.mark.serve
def test_full_replicas_are_not_asked_without_a_pause(handle, streams, calls, tmp_path):
    from app.ray_private import stream_by_value

    with contract("PendingRequest.routing_context.should_backoff"):
        for _ in range(2 * MAX_ONGOING_REQUESTS):
            streams()
        before = calls.stat().st_size
        waiting = stream_by_value(handle, "items", "a")
        time.sleep(2)
        num_calls = calls.stat().st_size - before
        assert 1 < num_calls < 100, f"the router was asked {num_calls} times in 2 s"
        (tmp_path / "release").touch()
        assert len(list(waiting)) == 2


@pytest.mark.serve
def test_where_serve_listens_and_what_started_it(ray_cluster, monkeypatch):
    import os

    from app import ray_private

    with contract("_get_global_client().http_config"):
        host, port = ray_private.http_address()
        assert f"http://{host}:{port}" == ray_cluster
    with contract("the resource node:__internal_head__"):
        assert ray_private.is_on_head_node()
    with contract("get_authentication_mode"):
        # Since Ray 2.60 a cluster that a program starts for itself asks for them.
        assert ray_private.asks_for_tokens() == (os.environ.get("RAY_AUTH_MODE") == "token")
    with contract("the job table of ray._private.state"):
        import ray

        assert ray_private.find_serve_run() is None
        # This process is none, and a worker of the tests has changed its own command line.
        [job] = ray_private.state.jobs()
        monkeypatch.setattr(ray_private, "_command", lambda pid: job["Entrypoint"].split())
        monkeypatch.setattr(ray_private, "_is_serve_run", lambda pid: pid == os.getpid())
        found = ray_private.find_serve_run()
        assert found is not None and found.pid == os.getpid()
        assert found.job_id == ray.get_runtime_context().get_job_id()


def test_an_empty_context_has_no_variables():
    import contextvars

    from app.ray_private import as_own_request

    variable = contextvars.ContextVar("variable")
    variable.set(1)
    assert as_own_request(variable.get, None) is None and variable.get() == 1


def test_the_router_brings_nothing_heavy_along():
    """Serve loads it into its controller and its proxies, and so what it refers to."""
    pickled = _run(
        "from ray import cloudpickle\n"
        "from app.routing import serve_router\n"
        "cloudpickle.register_pickle_by_value(serve_router)\n"
        "print(cloudpickle.dumps(serve_router.AffinityRouter).hex())"
    )
    loaded = _run(
        "import sys, ray.serve.request_router\n"
        "before = set(sys.modules)\n"
        f"ray.cloudpickle.loads(bytes.fromhex('{pickled.strip()}'))\n"
        "print(*set(sys.modules) - before)"
    )
    others = {name for name in loaded.split() if name.split(".")[0] not in sys.stdlib_module_names}
    parts = ["load_board", "order", "spread", "view", "waiting_line"]
    assert others == {
        "app",
        "app.ray_private",
        "app.routing",
        *(f"app.routing.{part}" for part in parts),
        # Plain data.
        "slora_core",
        "slora_core.errors",
        "slora_core.requests",
    }


def test_a_broken_contract_names_the_touch():
    with (
        pytest.raises(AssertionError, match="may have changed the_touch, .* KeyError"),
        contract("the_touch"),
    ):
        raise KeyError


def _run(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
