"""One machine's fault costs that machine, everybody's ends the job; and what a worker looks for on its machine."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from quick_job import Runs

from ttmray.corpus.left_out import LeftOut, WorkerFault
from ttmray.corpus.placement import Group, Node
from ttmray.corpus.ray_runner import RayWorker, _innermost, _run_hash, look_around
from ttmray.errors import UserError
from ttmray.storage import Folder

MODELS = Group("models", ("score", "write"), heavy=True, cpus=0, gpus=1)
DECODE = Group("decode", ("decode",), heavy=False, cpus=1, gpus=0)
GROUPS = [DECODE, MODELS]
NODES = [Node("head", "head", 0, 0), *(Node(name, name, 4, 1) for name in "abcde")]


def fault(node: str, message: str = "CUDA error", expected: bool = True) -> WorkerFault:
    return WorkerFault(node, f"machine {node}", message, "Mend it.", expected)


def out(left_out: LeftOut, node: str, message: str = "CUDA error", **more: Any) -> None:
    settings: dict[str, Any] = {"nodes": NODES, "groups": GROUPS, "error": RuntimeError("with its traceback")} | more
    left_out.leave_out(fault(node, message), **settings)


def test_a_machine_that_fails_is_named_and_left_out(capsys):
    left_out = LeftOut()
    out(left_out, "b")
    assert [node.id for node in left_out.usable(NODES)] == ["head", "a", "c", "d", "e"]
    assert "machine b is left out from here on" in capsys.readouterr().out


def test_three_machines_in_a_row_are_everybodys_fault_and_two_are_not():
    left_out = LeftOut()
    out(left_out, "a", "there is no bundle")
    out(left_out, "b", "no space for shard 7")
    with pytest.raises(UserError, match=r"shard 8 \(on machine c, after machine b, after machine a\)") as caught:
        out(left_out, "c", "no space for shard 8", nodes=[*NODES, *(Node(name, name, 4, 1) for name in "fghij")])
    assert caught.value.hint == "Mend it."


def test_three_machines_are_left_out_one_by_one_where_others_do_their_work_in_between():
    left_out, nodes = LeftOut(), [*NODES, Node("f", "f", 4, 1)]
    for node in "abc":
        out(left_out, node, nodes=nodes)
        left_out.progress()
    assert left_out.nodes == {"a", "b", "c"}


def test_most_machines_that_take_work_are_never_left_out():
    left_out = LeftOut()
    for node in "ab":
        out(left_out, node)
        left_out.progress()
    with pytest.raises(UserError, match=r"CUDA error \(on machine c\)"):  # of five: the head takes no work
        out(left_out, "c")


def test_the_last_machine_of_a_group_is_not_left_out():
    nodes = [*NODES[:1], Node("a", "a", 8, 0), Node("b", "b", 4, 1), Node("c", "c", 4, 0)]
    with pytest.raises(UserError, match="CUDA error"):
        out(LeftOut(), "b", nodes=nodes)
    out(LeftOut(), "a", nodes=nodes)


def test_one_machine_alone_says_what_it_always_said():
    with pytest.raises(UserError) as caught:
        out(LeftOut(), "a", nodes=[Node("a", "a", 8, 1)])
    assert caught.value.message == "CUDA error"


def test_what_nobody_expected_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="with its traceback"):
        LeftOut().leave_out(fault("a", expected=False), NODES[1:2], GROUPS, RuntimeError("with its traceback"))


def test_ray_may_give_up_once_without_a_unit_in_between(capsys):
    left_out = LeftOut()
    left_out.start_again(ValueError("an object is lost\nand more"))
    assert "ValueError: an object is lost" in capsys.readouterr().out
    left_out.progress()
    left_out.start_again(ValueError("an object is lost"))
    with pytest.raises(UserError, match="twice in a row"):
        left_out.start_again(ValueError("an object is lost"))


def test_a_fault_travels_between_processes_whatever_ray_data_adds_to_it():
    annotated = fault("a")
    annotated.args = ("CUDA error\nTo change retry attempts, configure ...",)
    again = pickle.loads(pickle.dumps(annotated))  # noqa: S301 - our own bytes
    assert (again.node, again.message, again.hint, again.expected) == ("a", "CUDA error", "Mend it.", True)


def test_the_innermost_reason_is_found_in_what_ray_raises():
    from ray.exceptions import RayTaskError

    inner = fault("a")
    task = RayTaskError("submit", "its traceback", inner, "ray::MapWorker", 1, "127.0.0.1")
    twice = RayTaskError("next", "its traceback", task.as_instanceof_cause(), "ray::MapWorker", 2, "127.0.0.1")
    assert _innermost(task.as_instanceof_cause()) is inner
    assert _innermost(twice.as_instanceof_cause()) is inner
    assert _innermost(inner) is inner


@pytest.fixture
def run(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "run", 1)


def hash_of(run: Runs) -> str:
    return _run_hash(Folder(str(run.folder)))


def test_a_worker_sees_that_its_run_folder_is_the_drivers(run):
    job, run_hash = run.job(), hash_of(run)
    look_around(job, 0, run_hash, within_s=0)
    (run.folder / "run.json").write_text('{"another": "run"}')
    with pytest.raises(UserError, match=r"run\.json is not there, or not the same"):
        look_around(job, 0, run_hash, within_s=0)
    (run.folder / "run.json").unlink()
    with pytest.raises(UserError, match="Every node must see the output folder"):
        look_around(job, 0, run_hash, within_s=0)


def test_a_worker_sees_that_the_songs_are_there(run, tmp_path):
    with pytest.raises(UserError, match="Every node must see the songs"):
        look_around(replace(run.job(), root=str(tmp_path / "absent")), 0, hash_of(run), within_s=0)
    look_around(replace(run.job(), root=str(tmp_path)), 0, hash_of(run), within_s=0)
    look_around(replace(run.job(), root="s3://bucket/songs"), 0, hash_of(run), within_s=0)


def test_a_worker_that_was_given_a_gpu_does_not_run_on_the_cpu_without_a_word(run, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("auto", "cuda"):
        with pytest.raises(UserError, match="Ray gave 1 GPUs to a worker, but torch finds none"):
            look_around(run.job(device=device), 1, hash_of(run), within_s=0)
    look_around(run.job(device="cpu"), 1, hash_of(run), within_s=0)
    look_around(run.job(device="auto"), 0, hash_of(run), within_s=0)


def test_building_a_worker_is_no_matter_of_its_constructor(run):
    """Ray would start an actor again without end, and lose the type of what it raised."""
    RayWorker(replace(run.job(), root="/absent").to_json(), "all", ("no such stage",), 1.0, "another hash")
