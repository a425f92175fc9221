"""The corpus job on several nodes: real raylets, stages that only wait."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from quick_job import Runs

from ttmray.cluster import leave
from ttmray.corpus import ray_runner
from ttmray.corpus.ray_runner import run_ray
from ttmray.corpus.unit import Unit
from ttmray.errors import UserError

REPO = Path(__file__).resolve().parents[2]
MIB = 2**20


PATIENCE = {
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_worker_niceness": "0",
    "RAY_worker_register_timeout_seconds": "600",
}
"""Busy machines start processes slowly; that is no death of a node."""


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


class Raylets:
    """A cluster on this machine, whose head takes no work."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": 200 * MIB, "include_dashboard": False, **agent_ports()}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)

    def add(self, cpus: int, gpus: int = 0) -> Any:
        return self.cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=100 * MIB, **agent_ports())

    def kill(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def raylets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Raylets]:
    leave()
    # what workers import: this package and `quick_job`
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(REPO), str(REPO / "tests"))))
    for name, value in PATIENCE.items():
        monkeypatch.setenv(name, value)
    raylets = Raylets()
    monkeypatch.setenv("RAY_ADDRESS", raylets.cluster.address)
    yield raylets
    leave()
    raylets.cluster.shutdown()


@pytest.fixture
def runs(tmp_path: Path) -> Callable[[int], Runs]:
    def make(units: int) -> Runs:
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "run.json").write_text("{}")
        return Runs(folder, units)

    return make


def go(run: Runs, then: Callable[[int], None] = lambda _: None, **settings: Any) -> None:
    """Run it; `then` gets the number of units done after each."""

    def done(unit: Unit) -> None:
        run.seen.append(unit.name)
        then(len(run.seen))

    run_ray(run.job(**settings), run.units, done)
    assert sorted(run.seen) == [unit.name for unit in run.units]
    assert sorted(run.committed()) == sorted(run.seen)


def test_three_nodes_of_two_kinds_all_work_and_one_that_breaks_is_left_out(raylets, runs, capsys):
    """Decoders could take every CPU of the nodes with GPUs: models must start all the same."""
    first, second, _ = raylets.add(1, 1), raylets.add(1, 1), raylets.add(2)
    run = runs(24)
    sick = run.folder.with_name("sick.json")

    def then(_: int) -> None:
        if not sick.exists() and second.node_id in run.committed().values():
            sick.write_text(json.dumps({second.node_id: "breaks"}))

    go(run, then, pace_s=0.3, crowd=2)
    text = capsys.readouterr().out
    assert "is left out from here on" in text
    assert second.node_id[:8] in text
    assert "CUDA error" in text
    assert set(run.committed().values()) == {first.node_id, second.node_id}


@pytest.mark.slow
def test_losing_a_node_costs_its_units_in_flight_and_a_node_that_joins_gets_work(raylets, runs):
    lost, stays = raylets.add(2, 1), raylets.add(2, 1)
    run, joined = runs(80), []

    def then(count: int) -> None:
        if count == 10:
            raylets.kill(lost)
        if count == 20:
            joined.append(raylets.add(2, 1))

    go(run, then, pace_s=0.5, crowd=2)
    assert joined[0].node_id in run.committed().values()
    assert list(run.committed().values()).count(stays.node_id) >= 20


@pytest.mark.slow
def test_an_empty_cluster_is_waited_for_with_a_message(raylets, runs, capsys, monkeypatch):
    run, joined, say = runs(6), [], ray_runner.console.print

    def then_a_node_joins(*words: Any, **style: Any) -> None:
        say(*words, **style)
        if not joined:  # in this thread: Ray sets signal handlers with every node
            joined.append(raylets.add(2, 1))

    monkeypatch.setattr(ray_runner.console, "print", then_a_node_joins)
    go(run, models={"gpus": 1})
    text = capsys.readouterr().out
    assert "waiting for nodes: a worker of decode needs 1 CPUs and 0 GPUs and models needs 0 CPUs and 1 GPUs" in text
    assert "the cluster has 0 CPUs and 0 GPUs" in text


@pytest.mark.slow
def test_what_no_node_can_build_ends_the_job_with_one_message(raylets, runs):
    nodes = [raylets.add(1, 1), raylets.add(1, 1)]
    run = runs(6)
    sick = dict.fromkeys((node.node_id for node in nodes), "cannot be built")
    run.folder.with_name("sick.json").write_text(json.dumps(sick))
    with pytest.raises(Exception, match="no kernel image is available"):
        go(run)
    assert run.seen == []


@pytest.mark.slow
def test_a_run_folder_that_no_node_sees_is_said_at_the_start(raylets, runs, monkeypatch):
    raylets.add(1, 1)
    run = runs(4)
    monkeypatch.setattr("ttmray.corpus.ray_runner._run_hash", lambda _: "of another file")
    with pytest.raises(UserError, match=r"run\.json is not there, or not the same") as caught:
        go(run)
    assert "shared file system or a bucket" in caught.value.hint
    assert run.committed() == {}
