"""A Ray cluster of several nodes on one machine with the server on it, and ways to kill its parts.

Owns the cluster's life and who is who among its processes. Each victim is a process that is ended
by SIGKILL, as the kernel would for want of memory.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from app.args import SLoRAArgs
from benchmarks.report import ROOT
from benchmarks.serving.process_usage import usage_of_descendants

APP_NAME = "chaos"
HOST = "127.0.0.1"
# Each engine replica gets a worker node of its own; what else there is lies anywhere.
CPUS_PER_ENGINE = 2
CPUS_PER_WORKER = 3
# Seconds for which a node is away.
NODE_IS_AWAY_S = 3.0
READY_TIMEOUT_S = 120.0


class ChaosCluster:
    """The running server; see `chaos_cluster`."""

    def __init__(self, args: SLoRAArgs, port: int, draw: random.Random) -> None:
        from ray.cluster_utils import Cluster

        self.url = f"http://{HOST}:{port}"
        self._args = args
        self._port = port
        self._draw = draw
        self._shared_memory = _shared_memory()
        self.victims: dict[str, Callable[[], int]] = {
            "engine": lambda: self._kill_process("slora_core.engine.main"),
            "replica": lambda: self._kill_process(f"ServeReplica:{APP_NAME}:engine"),
            "store": lambda: self._kill_process("AdapterStoreActor"),
            "registry": lambda: self._kill_process(f"ServeReplica:{APP_NAME}:registry"),
            "ingress": lambda: self._kill_process(f"ServeReplica:{APP_NAME}:ingress"),
            "node": self._kill_node,
        }
        self._cluster: Any = Cluster(
            initialize_head=True,
            connect=False,
            head_node_args={"num_cpus": 1, "include_dashboard": False},
        )

    def start(self) -> None:
        import ray
        from ray import serve

        from app.build import application

        for _ in range(self._args.num_replicas):
            self.add_node()
        ray.init(address=self._cluster.address, log_to_driver=False, configure_logging=False)
        serve.start(http_options={"host": HOST, "port": self._port}, proxy_location="HeadOnly")
        serve.run(application(self._args), name=APP_NAME, route_prefix="/")
        self.wait_whole()

    def add_node(self) -> None:
        self._cluster.add_node(num_cpus=CPUS_PER_WORKER)

    def engine_stats(self) -> list[dict[str, Any]]:
        return list(self._engine().broadcast("stats").results(timeout_s=10))

    def wait_whole(self) -> None:
        """Wait until every process is there, and Serve, the engines and a client say so.

        Raises:
            TimeoutError: they are not.
        """
        deadline = time.monotonic() + READY_TIMEOUT_S
        while (problem := self._not_whole()) is not None:
            if time.monotonic() > deadline:
                raise TimeoutError(problem)
            time.sleep(0.1)

    def _not_whole(self) -> str | None:
        """What is missing; one that has ended and that nobody has missed yet is, too."""
        from ray import serve

        wanted = {
            "engine": self._args.num_replicas,
            "ingress": self._args.num_ingress_replicas,
            "registry": 1,
        }
        roles = [usage.role for usage in usage_of_descendants(os.getpid()).values()]
        deployments = serve.status().applications[APP_NAME].deployments
        for name, num_replicas in wanted.items():
            role = f"ServeReplica:{APP_NAME}:{name}"
            num_processes = sum(found.startswith(role) for found in roles)
            states = deployments[name].replica_states
            if num_processes != num_replicas or states != {"RUNNING": num_replicas}:
                return f"{num_processes} processes of {name}, which Serve says are {states}"
        try:
            answers = self._engine().broadcast("is_alive").results(timeout_s=5)
            if answers != [True] * self._args.num_replicas:
                return f"the engines say {answers}"
            # Of every ingress, most likely.
            for _ in range(4 * self._args.num_ingress_replicas):
                httpx.get(f"{self.url}/health", timeout=5, trust_env=False).raise_for_status()
        except Exception as error:
            return repr(error)
        return None

    def left_over(self) -> list[str]:
        """What is held although nothing runs: pages, requests, leases."""
        import ray

        deadline = time.monotonic() + 30
        while True:
            held = [
                f"{name} {stats[name]} in engine {stats['engine_pid']}"
                for stats in self.engine_stats()
                for name in ("num_running", "num_waiting", "num_kv_pages")
                if stats[name]
            ]
            stores = ray.get([store.stats.remote() for store in self._stores()], timeout=30)
            held += [f"{stats.num_leases} leases" for stats in stores if stats.num_leases]
            if not held or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        try:
            self._engine().broadcast("check_integrity").results(timeout_s=30)
            ray.get([store.check_integrity.remote() for store in self._stores()], timeout=30)
        except Exception as error:
            held.append(f"integrity: {error!r}")
        return held

    def close(self) -> list[str]:
        """Stop everything; processes and shared memory that are left although nothing should be."""
        import ray
        from ray import serve

        own = set(usage_of_descendants(os.getpid()))
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        self._cluster.shutdown()
        deadline = time.monotonic() + 20
        while True:
            left = {
                pid: usage.role
                for pid, usage in usage_of_descendants(1).items()
                if pid in own and usage.role != "?"
            }
            files = _shared_memory() - self._shared_memory
            if not (left or files) or time.monotonic() > deadline:
                processes = [f"process {pid}, {role}" for pid, role in left.items()]
                return processes + [f"/dev/shm/{name}" for name in sorted(files)]
            time.sleep(0.2)

    def _engine(self) -> Any:
        from ray import serve

        return serve.get_deployment_handle("engine", APP_NAME)

    def _stores(self) -> list[Any]:
        import ray

        actors = ray.util.list_named_actors(all_namespaces=True)
        return [
            ray.get_actor(**actor)
            for actor in actors
            if actor["name"].startswith(f"adapter-store:{APP_NAME}:")
        ]

    def _kill_process(self, role: str) -> int:
        """End one of the processes with this role; its pid."""
        while True:
            processes = usage_of_descendants(os.getpid())
            # Ray adds the method that runs.
            pids = [pid for pid, usage in processes.items() if usage.role.startswith(role)]
            if pids:
                pid = self._draw.choice(pids)
                os.kill(pid, signal.SIGKILL)
                return pid
            # The one before is being replaced.
            time.sleep(0.1)

    def _kill_node(self) -> int:
        """End a worker's raylet, with all that runs there; another node comes in its place."""
        node = self._draw.choice(sorted(self._cluster.worker_nodes, key=lambda node: node.node_id))
        pid = int(node.all_processes["raylet"][0].process.pid)
        os.kill(pid, signal.SIGKILL)
        time.sleep(NODE_IS_AWAY_S)
        self._cluster.remove_node(node, allow_graceful=False)
        self.add_node()
        return pid


def _shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


@contextmanager
def chaos_cluster(args: SLoRAArgs, port: int, seed: int) -> Iterator[ChaosCluster]:
    """The application on as many worker nodes as it has engine replicas, and a head without any.

    Whoever leaves the context calls `close` first for what is left; it is called here otherwise.
    """
    # Ray's workers import the packages from here, installed or not.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    cluster = ChaosCluster(args, port, random.Random(seed))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
