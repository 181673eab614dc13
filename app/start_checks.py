"""What of the machine decides before anything starts whether the application can: ports, GPUs.

Run where Serve builds the application, in a process of its cluster.
"""

import os
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

import psutil
import ray

from app import ray_private
from app.args import SLoRAArgs


def check_machine(args: SLoRAArgs) -> None:
    """Raises ValueError for what this machine cannot give, before a replica asks for it."""
    if ray_private.is_on_head_node():
        check_port(*ray_private.http_address())
    serve_run = ray_private.find_serve_run()
    # Nodes may join any other cluster.
    if serve_run is not None and serve_run.owns_cluster:
        check_gpus(args, ray.cluster_resources().get("GPU", 0.0))


def check_gpus(args: SLoRAArgs, num_gpus: float) -> None:
    """Raises ValueError where the machine has fewer GPUs than the replicas ask for."""
    asked = args.num_replicas * args.gpus_per_replica
    if asked > num_gpus:
        raise ValueError(
            f"num_replicas {args.num_replicas} of gpus_per_replica {args.gpus_per_replica:g} need "
            f"{asked:g} GPUs; this machine has {num_gpus:g}"
        )


def check_port(host: str, port: int) -> None:
    """Raises ValueError where a process outside this node's Ray listens on the same port too.

    Serve's proxy shares its port with whoever shares theirs, and the system deals connections out
    among them.
    """
    ours = psutil.Process(os.getppid())
    own_pids = {process.pid for process in ours.children(recursive=True)}
    for connection in psutil.net_connections("tcp"):
        listens = connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        if listens and connection.pid not in own_pids and _overlap(host, connection.laddr.ip):
            who = "another user's" if connection.pid is None else f"{connection.pid}"
            raise ValueError(
                f"http_options: port {port} of {host} is taken by process {who}; stop it or choose "
                "another port"
            )


def _overlap(host: str, other: str) -> bool:
    """Whether two servers at these addresses meet the same connections."""
    ours, theirs = _address(host), _address(other)
    if ours.version != theirs.version:
        # The wildcard of IPv6 takes IPv4's connections as well.
        return str(IPv6Address(0)) in (str(ours), str(theirs))
    return ours == theirs or ours.is_unspecified or theirs.is_unspecified


def _address(host: str) -> IPv4Address | IPv6Address:
    return ip_address(socket.getaddrinfo(host, None)[0][4][0])
