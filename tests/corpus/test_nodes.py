"""The corpus job on several nodes: real raylets, stages that only wait or calculate."""

import gc
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fault_schedules import Job, World, differences
from quick_job import Runs
from raylets import Raylets, several_nodes

from ttmray.corpus import ray_runner
from ttmray.corpus.left_out import LeftOut
from ttmray.corpus.placement import Group
from ttmray.corpus.ray_runner import Wishes
from ttmray.errors import UserError


@pytest.fixture
def raylets() -> Iterator[Raylets]:
    with several_nodes() as raylets:
        yield raylets


@pytest.mark.slow
def test_three_nodes_of_two_kinds_all_work_and_one_that_breaks_is_left_out(raylets, tmp_path, capsys):
    """Decoders could take every CPU of the nodes with GPUs: models must start all the same."""
    first, second, _ = raylets.add(1, 1), raylets.add(1, 1), raylets.add(2)
    run, ill = Runs(tmp_path / "run", 24), []

    def then(_: int) -> None:
        if not ill and second.node_id in run.committed().values():
            ill.append(second)
            run.ail(**{second.node_id: "breaks"})

    gc.disable()  # a driver with much in memory collects its garbage that rarely
    try:
        run.go(then, pace_s=0.3, crowd=2)
    finally:
        gc.enable()
    text = capsys.readouterr().out
    assert "is left out from here on" in text
    assert second.node_id[:8] in text
    assert "CUDA error" in text
    assert set(run.committed().values()) == {first.node_id, second.node_id}


@pytest.mark.slow
@pytest.mark.parametrize("frames", [50_000, 2_500_000], ids=["small", "a fifth of the object store each"])
def test_losing_nodes_costs_their_units_in_flight_and_a_node_that_joins_gets_work(raylets, tmp_path, frames):
    """The node that is left makes again what lost ones had decoded, and at the end what their models had begun; also
    where decoders wait for room for what they have made."""
    first, stays = raylets.add(2, 1), raylets.add(2, 1)
    run, joined, lost = Runs(tmp_path / "run", 60), [], []

    def then(count: int) -> None:
        if count == 10:
            lost.append(first)
            raylets.kill(first)
        if count == 20:
            run.ail(**{stays.node_id: "slow"})  # as long as the one that joins needs to start
            joined.append(raylets.add(2, 1))
        if len(lost) == 1 and joined and list(run.committed().values()).count(joined[0].node_id) >= 3:
            run.ail()
            lost.append(joined[0])
            raylets.kill(joined[0])

    run.go(then, pace_s=0.5, crowd=2, frames=frames)
    assert len(lost) == 2
    assert list(run.committed().values()).count(stays.node_id) >= 20


@pytest.mark.slow
def test_an_empty_cluster_is_waited_for_with_a_message(raylets, tmp_path, capsys, monkeypatch):
    run, joined, say = Runs(tmp_path / "run", 6), [], ray_runner.console.print

    def then_a_node_joins(*words: Any, **style: Any) -> None:
        say(*words, **style)
        if not joined:  # in this thread: Ray sets signal handlers with every node
            joined.append(raylets.add(2, 1))

    monkeypatch.setattr(ray_runner.console, "print", then_a_node_joins)
    run.go(models={"gpus": 1})
    text = capsys.readouterr().out
    assert "waiting for nodes: a worker of decode needs 1 CPUs and 0 GPUs and models needs 0 CPUs and 1 GPUs" in text
    assert "the cluster has 0 CPUs and 0 GPUs" in text


@pytest.mark.slow
def test_a_node_that_cannot_build_its_stages_is_named_and_its_units_go_elsewhere(raylets, tmp_path, capsys):
    sound, sick = raylets.add(1, 1), raylets.add(1, 1)
    run = Runs(tmp_path / "run", 8)
    run.ail(**{sick.node_id: "cannot be built"})
    run.go(crowd=2)  # the sound one begins once the other one has tried
    text = capsys.readouterr().out
    assert f"(node {sick.node_id[:8]}) is left out from here on" in text
    assert "no kernel image is available" in text
    assert set(run.committed().values()) == {sound.node_id}


@pytest.mark.slow
def test_what_no_node_can_build_ends_the_job_with_one_message(raylets, tmp_path):
    nodes = [raylets.add(1, 1), raylets.add(1, 1)]
    run = Runs(tmp_path / "run", 6)
    run.ail(**dict.fromkeys((node.node_id for node in nodes), "cannot be built"))
    with pytest.raises(Exception, match="no kernel image is available"):
        run.go()
    assert run.seen == []


@pytest.mark.slow
def test_a_run_folder_that_no_node_sees_is_said_at_the_start(raylets, tmp_path, monkeypatch):
    raylets.add(1, 1)
    run = Runs(tmp_path / "run", 4)
    monkeypatch.setattr("ttmray.corpus.ray_runner._run_hash", lambda _: "of another file")
    with pytest.raises(UserError, match=r"run\.json is not there, or not the same") as caught:
        run.go()
    assert "shared file system or a bucket" in caught.value.hint
    assert run.committed() == {}


def asked_for() -> dict[str, int]:
    """What an autoscaler of the cluster is asked for: resources as text -> how often."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    demands = get_cluster_status(os.environ["RAY_ADDRESS"]).resource_demands
    assert not demands.cluster_constraint_demand
    bundles = [one for demand in demands.ray_task_actor_demand for one in demand.bundles_by_count]
    return {str({k: v for k, v in one.bundle.items() if v}): one.count for one in bundles}


@pytest.mark.slow
def test_an_autoscaler_is_asked_for_one_more_worker_and_again_once_there_is_one(raylets):
    import ray

    models = Group("models", ("score", "write"), heavy=True, cpus=0, gpus=1)
    decode = Group("decode", ("decode",), heavy=False, cpus=1, gpus=0)
    wishes, more, one = Wishes(), LeftOut(), "{'GPU': 1.0}"

    class Holder:
        def here(self) -> bool:
            return True

    def until(expected: dict[str, int]) -> None:
        deadline = time.monotonic() + 120
        while (now := asked_for()) != expected:
            assert time.monotonic() < deadline, now
            time.sleep(0.5)

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    try:
        wishes.ask([models, decode], more)
        assert not wishes.due()
        until({one: 1, "{'CPU': 1.0}": 1})
        for _ in range(3):
            wishes.ask([models], more)  # not twice what is pending, and no longer what nobody lacks
        until({one: 1})
        raylets.add(0, 1)
        until({})
        holder = ray.remote(num_cpus=0, num_gpus=1)(Holder).remote()
        assert ray.get(holder.here.remote())
        wishes.ask([models], more)
        until({one: 1})
        wishes.end()
        until({})
    finally:
        wishes.end()
        ray.shutdown()


@pytest.mark.slow
def test_what_stages_do_is_in_rays_metrics(raylets, tmp_path):
    raylets.add(2, 1)
    run = Runs(tmp_path / "run", 8)
    run.go(pace_s=0.5)
    expected = [
        r'ttmray_rows_total{.*outcome="in".*stage="decode".*} 8',
        r'ttmray_rows_total{.*outcome="ok".*stage="write".*} 8',
        r'ttmray_stage_seconds_total{.*kind="wall".*stage="score".*} [4-9]',
        r'ttmray_stage_seconds_total{.*kind="waited".*stage="score"',
        r"ttmray_units_left{.*} 0",
    ]
    deadline, seen = time.monotonic() + 240, ""
    while missing := [one for one in expected if not re.search(one, seen)]:
        assert time.monotonic() < deadline, (missing, re.findall("(?m)^[^#]*ttmray.*", seen))
        time.sleep(2)
        seen += raylets.metrics()  # a gauge is told once for every report of its process


@pytest.mark.slow
def test_a_cluster_that_begins_empty_grows_and_loses_a_node_ends_as_one_process_does(raylets, tmp_path, monkeypatch):
    """The command itself, from songs to the end of a run."""
    world = World.at(tmp_path)
    monkeypatch.setenv("FAULT_PACE_S", "2")
    job, log, joined = Job(world.songs, tmp_path / "run", "runtime.runner=ray"), tmp_path / "log.txt", []

    def until(seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 400
        while not seen():
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    with log.open("wb") as stdout:
        driver = job.start(stdout)
    try:
        until(lambda: "waiting for nodes: a worker of" in log.read_text())
        joined.append(raylets.add(2, 1))
        until(lambda: job.committed() >= 1)
        joined.append(raylets.add(2, 1))
        until(lambda: job.committed() >= 4)
        raylets.kill(joined[0])
        assert driver.wait(timeout=400) == 0, log.read_text()
    finally:
        driver.kill()
    assert differences(tmp_path / "run", world.reference) == {}
