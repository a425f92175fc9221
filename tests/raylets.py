"""A Ray cluster of several nodes on this machine: real raylets, which may be added and killed."""

import os
import re
import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from ttmray.cluster import leave

MIB = 2**20
TESTS = Path(__file__).resolve().parent
NODES = {
    "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))),
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_worker_niceness": "0",
    "RAY_worker_register_timeout_seconds": "600",
}
"""Environment of nodes: what workers import, and that a busy machine starts processes slowly, which is no death."""
Started = TypeVar("Started")


def agent_ports() -> dict[str, int]:
    """Free ports: a raylet waits 15 s for agents that choose their own, and dies."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    sockets = [socket.socket() for _ in names]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return dict(zip(names, ports, strict=True))


def patiently(start: Callable[[], Started]) -> Started:
    """Try again what a busy machine does not do in time: a raylet gives its agents 15 s and has no option for it."""
    for _ in range(4):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


def with_its_agents_port(start: Callable[..., Any]) -> Callable[..., Any]:
    """Raylets are told all ports of their agents but one, which Ray forgets to pass on, and die if they do not learn it
    from the agent within 15 s: little on a busy machine."""

    def wrapped(command: list[str], process_type: str, *of: Any, **how: Any) -> Any:
        if process_type == "raylet" and (port := re.search(r"--listen-port=(\d+)", " ".join(command))):
            command = [*command, f"--dashboard_agent_listen_port={port[1]}"]
        return start(command, process_type, *of, **how)

    return wrapped


class Raylets:
    """A cluster on this machine, whose head takes no work."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": 200 * MIB, "include_dashboard": False}
        self.ports = agent_ports()
        self.cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head | self.ports))

    def metrics(self) -> str:
        """What the head's machine, which is the driver's, tells Prometheus."""
        address = f"http://127.0.0.1:{self.ports['metrics_export_port']}/metrics"
        with urllib.request.urlopen(address, timeout=60) as answer:
            return str(answer.read().decode())

    def add(self, cpus: int, gpus: int = 0) -> Any:
        sizes = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": 100 * MIB}
        return patiently(lambda: self.cluster.add_node(**sizes, **agent_ports()))

    def kill(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)


@contextmanager
def several_nodes(**environment: str) -> Iterator[Raylets]:
    """A cluster, to which this process and its children connect meanwhile.

    Args:
        environment: further variables of nodes and children.
    """
    from ray._private import services

    leave()
    start = with_its_agents_port(services.start_ray_process)
    with mock.patch.dict(os.environ, NODES | environment), mock.patch.object(services, "start_ray_process", start):
        raylets = Raylets()
        os.environ["RAY_ADDRESS"] = raylets.cluster.address
        try:
            yield raylets
        finally:
            leave()
            raylets.cluster.shutdown()
