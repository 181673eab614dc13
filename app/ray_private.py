"""Every use of what Ray does not promise: one function each, tested in Ray 2.60.

`pyproject.toml` caps Ray at that minor version, and `tests/app/test_ray_private.py` has a test of
each. It knows nothing of adapters and requests, and imports nothing but Ray: Serve's processes
load it with the router, `app.routing.serve_router`.
"""

import contextvars
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import ray
from ray import serve
from ray._private import state
from ray._raylet import (  # type: ignore[attr-defined]
    AuthenticationMode,
    get_authentication_mode,
)
from ray.experimental import internal_kv
from ray.serve._private.config import DeploymentConfig
from ray.serve.context import _get_global_client
from ray.serve.deployment import Deployment
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter

P = ParamSpec("P")
T = TypeVar("T")

# Among the `extra` of a record: Serve writes it to its log's file and not to the terminal.
# Relies on `log_to_stderr`, by which Serve keeps its own access log from there; no option does that
# to single records. Tested in Ray 2.60.
NOT_ON_TERMINAL = {"log_to_stderr": False}


def stream_by_value(
    handle: DeploymentHandle, method_name: str, session_id: str, *args: Any, **kwargs: Any
) -> DeploymentResponseGenerator:
    """Call a generator method of a replica; its items come over gRPC.

    Relies on the option `_by_reference=False` of `DeploymentHandle.options`. By default each item
    is an object of Ray's store, which costs the replica and the ingress several times as much. The
    public way, the environment variable RAY_SERVE_USE_GRPC_BY_DEFAULT, must be set for every
    process of the cluster before it starts. Tested in Ray 2.60.
    """
    by_value = handle.options(
        stream=True,
        session_id=session_id,
        _by_reference=False,
        # Serve's default, cloudpickle, can send functions, and takes three times as long.
        request_serialization="pickle",
        response_serialization="pickle",
    )
    return as_own_request(getattr(by_value, method_name).remote, *args, **kwargs)


def as_own_request(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a handle as if from outside any request.

    Relies on Serve keeping the current request in a context variable, so that an empty context has
    none. Serve's router takes calls from within one HTTP request for one and the same, by its
    internal id, and lets all but one of several wait for ever; no option gives a call an id of its
    own. Tested in Ray 2.60.
    """
    return contextvars.Context().run(call, *args, **kwargs)


def handle_by_name(deployment: str, app_name: str) -> DeploymentHandle:
    """A handle to a deployment that need not be there (yet); usable on an event loop.

    Relies on `_check_exists=False` of `serve.get_deployment_handle`. Without it the call blocks
    until Serve's controller answers, and fails while the application is deployed again; the
    function has no asynchronous twin. Tested in Ray 2.60.
    """
    return serve.get_deployment_handle(deployment, app_name, _check_exists=False)


def ingress_built_in_replica(ingress: type[T]) -> type[T]:
    """Class decorator `serve.ingress` for an ASGI application that `build_asgi_app` makes.

    Relies on `__serve_build_asgi_app__`, which Serve calls in the replica after the constructor;
    only the docstring of `serve.ingress` names it. The documented ways pickle an application, or a
    builder that sees neither the constructor's arguments nor its handles. Tested in Ray 2.60.
    """
    ingress.__serve_build_asgi_app__ = ingress.build_asgi_app  # type: ignore[attr-defined]
    return serve.ingress()(ingress)


def with_code_version(deployment: Deployment, code_version: str) -> Deployment:
    """The deployment with replicas that a new version replaces, and nothing else of the code.

    Relies on Serve setting `DeploymentConfig.version` when it deploys, to a hash of the whole
    application's arguments, and on replicas being replaced where what it reads back is another
    one. The parameter `version` of `serve.deployment` is refused since Ray 2.60, so that without
    this a change of any argument replaces every replica of every deployment. Tested in Ray 2.60.
    """

    class ConfigOfOwnVersion(DeploymentConfig):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, code_version if name == "version" else value)

    own = deployment.options()
    config = own._deployment_config
    own._deployment_config = ConfigOfOwnVersion.model_construct(
        config.model_fields_set, **dict(config)
    )
    return own


def read_from_cluster(namespace: str, prefix: str) -> dict[str, bytes]:
    """What `write_to_cluster` of any process of this cluster wrote, by key; blocks.

    Relies on `_internal_kv_list` of `ray.experimental.internal_kv`, the store in which Ray keeps
    its own state, and on `internal_kv_multi_get` of its client, which costs one call where there
    may be thousands of keys. Public are only actors and objects, which end with a process or a
    node. Tested in Ray 2.60.

    Raises:
        RayError: the head node does not answer.
    """
    keys = internal_kv._internal_kv_list(prefix, namespace=namespace)
    client = internal_kv.internal_kv_get_gcs_client()
    found = client.internal_kv_multi_get(keys, namespace.encode())
    return {key.decode(): data for key, data in found.items()}


def write_to_cluster(namespace: str, key: str, data: bytes) -> None:
    """Keep `data` for as long as the cluster lives; blocks.

    Relies on `_internal_kv_put`, as `read_from_cluster` does on its twin. Tested in Ray 2.60.

    Raises:
        RayError: the head node does not answer.
    """
    internal_kv._internal_kv_put(key, data, overwrite=True, namespace=namespace)


@dataclass(frozen=True)
class ServeRun:
    """A `serve run` on this node that has not ended."""

    job_id: str
    pid: int
    # Whether Ray started with it and ends with it.
    owns_cluster: bool


def find_serve_run() -> ServeRun | None:
    """The last begun `serve run` of this cluster whose process is on this node; blocks.

    Relies on the job table of `ray._private.state`, of which the public State API is a client of
    the dashboard that may not have started yet; on a worker being its raylet's child; and on a
    local cluster's raylet being the child of the driver that started it. Tested in Ray 2.60.
    """
    here = ray.util.get_node_ip_address()
    for job in sorted(state.jobs(), key=lambda job: -job["StartTime"]):
        pid = job["DriverPid"]
        is_here = not job["IsDead"] and job["DriverIPAddress"] == here
        # With one address for several containers, a process id may be another's process.
        if is_here and _command(pid) == job["Entrypoint"].split() and _is_serve_run(pid):
            return ServeRun(job["JobID"], pid, _parent(os.getppid()) == pid)
    return None


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").split()
    except OSError:
        return []


def _is_serve_run(pid: int) -> bool:
    return re.search(r"\bserve(\.scripts)? run\b", " ".join(_command(pid))) is not None


def _parent(pid: int) -> int:
    # The name before it, in brackets, may hold anything.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def http_address() -> tuple[str, int]:
    """Host and port of Serve's proxies; for a process of the cluster; blocks.

    Relies on `_get_global_client` and its `http_config`. The public `serve.status` tells which
    proxies there are and not where they listen. Tested in Ray 2.60.
    """
    config = _get_global_client().http_config
    return config.host, config.port


def asks_for_tokens() -> bool:
    """Whether this process's cluster lets in only those who have its token.

    Relies on `get_authentication_mode` of `ray._raylet`; the documented variable RAY_AUTH_MODE is
    not set where Ray chose the mode. Tested in Ray 2.60.
    """
    return bool(get_authentication_mode() == AuthenticationMode.TOKEN)


def is_on_head_node() -> bool:
    """Whether this process is where the cluster's head is; blocks.

    Relies on the resource `node:__internal_head__`, which only that node has. Tested in Ray 2.60.
    """
    here = ray.get_runtime_context().get_node_id()
    return any(
        node["NodeID"] == here and "node:__internal_head__" in node["Resources"]
        for node in ray.nodes()
    )


class PatientRouter(RequestRouter):
    """A router in which a request that waits holds up no other, told at once of what is sent.

    Relies on the property `max_num_routing_tasks`, for how many requests at a time Serve looks for
    a replica, by default two for each replica; those behind them wait for these. Relies also on
    `on_send_request`, which Serve calls before the replica has answered, and on
    `on_new_queue_len_info`, by which it hands on what the replica answers: the documented
    `on_request_routed` comes after that, when the rest of a burst has been sent as well, and tells
    no numbers. Tested in Ray 2.60.
    """

    # They wait in a line of the router's own, which costs little; not without any bound.
    max_num_routing_tasks_cap = 128

    @property
    def max_num_routing_tasks(self) -> int:
        return self.max_num_routing_tasks_cap

    def on_send_request(self, replica_id: ReplicaID) -> None:
        self.on_sending(replica_id)
        super().on_send_request(replica_id)

    def on_sending(self, replica_id: ReplicaID) -> None:
        """A request is on its way to a replica; `on_request_completed` is called at its end."""

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        self.on_counted(replica_id, num_ongoing_requests)
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)

    def on_counted(self, replica_id: ReplicaID, num_requests: int) -> None:
        """A replica to which one was sent has so many, also where it refused that one."""


def pause_when_all_are_full(pending_request: PendingRequest) -> None:
    """To be called by a router's `choose_replicas`: without it, Serve asks again at once.

    Relies on `PendingRequest.routing_context.should_backoff`, which Serve's own routers set and
    its guide to custom ones does not name. Without it a router whose replicas are all full keeps a
    core busy. Tested in Ray 2.60.
    """
    pending_request.routing_context.should_backoff = True
