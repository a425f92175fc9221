"""What a run has cost: accounts of jobs in those of chains, over launches that were killed and processes that wait."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from ttmray import cost
from ttmray.cluster import ActorsConfig, each, gpus_held
from ttmray.errors import UserError
from ttmray.storage import Folder


@pytest.fixture
def run(tmp_path) -> Folder:
    return Folder(str(tmp_path / "run"))


def spent(run: Folder, name: str = cost.COST) -> tuple[float, float]:
    fields = cost.read(run, name)
    return fields["seconds"], fields["gpu_seconds"]


def test_gpus_count_as_long_as_they_are_held_and_time_always(run, clock, capsys):
    with cost.account(run):
        clock.pass_s(10)
        with cost.holding(2.5):
            clock.pass_s(100)
        clock.pass_s(5)
    assert spent(run) == (115, 250)
    with cost.account(run, since=clock.now - 5):  # another launch
        clock.pass_s(5)
    assert spent(run) == (125, 250)
    assert "cost so far: 0.035 h, 0.069 GPU-hours" in capsys.readouterr().out


def test_what_holds_gpus_inside_of_what_holds_gpus_counts_once(run, clock):
    with cost.account(run), cost.holding(1):
        with cost.holding(1):
            clock.pass_s(1)
        with cost.holding(4):
            clock.pass_s(10)
        clock.pass_s(100)
    assert spent(run) == (111, 141)


def test_an_account_that_is_opened_inside_knows_what_is_held(run, clock):
    with cost.account(run, "outer.json"), cost.holding(3):
        clock.pass_s(1)
        with cost.account(run):
            clock.pass_s(10)
    assert (spent(run, "outer.json"), spent(run)) == ((11, 33), (10, 30))


def test_time_that_goes_backwards_takes_nothing_away(run, clock):
    with cost.account(run), cost.holding(1):
        clock.pass_s(5)
        cost.note()
        clock.pass_s(-3600)
        cost.note()
        clock.pass_s(2)
    assert spent(run) == (7, 7)


def test_commits_in_quick_succession_do_not_write_each_time(run, clock, monkeypatch):
    writes = []
    write = Folder.write
    monkeypatch.setattr(Folder, "write", lambda self, name, data: (writes.append(name), write(self, name, data)))
    with cost.account(run):
        for _ in range(100):
            clock.pass_s(0.125)
            cost.note()
    assert spent(run) == (12.5, 0)
    assert len(writes) == 14  # one a second, and the last


def test_other_fields_of_the_file_stay(run, clock):
    run.write("step.json", json.dumps({"done": False, "seconds": 1, "gpu_seconds": 2}).encode())
    with cost.account(run, "step.json"), cost.holding(1):
        clock.pass_s(1)
    fields = json.loads(run.read("step.json"))
    assert fields.pop("cpu_seconds") >= 0
    assert fields == {"done": False, "seconds": 2, "gpu_seconds": 3}


def test_cpu_seconds_are_those_of_the_process_and_of_its_children_that_have_ended(run):
    code = "import time\nwhile time.process_time() < 0.3: pass"
    with cost.account(run):
        start = time.process_time()
        while time.process_time() - start < 0.1:
            pass
        subprocess.run([sys.executable, "-c", code], check=True)
        time.sleep(0.2)
    spent_cpu = cost.read(run)["cpu_seconds"]
    assert 0.35 <= spent_cpu < 2
    with cost.account(run):  # another launch begins at 0, and adds
        pass
    assert spent_cpu <= cost.read(run)["cpu_seconds"] < spent_cpu + 0.2


def test_a_process_that_notes_for_another_adds_its_own_cpu_time_alone(run):
    with cost.account(run):
        sent = copy.deepcopy(cost.opened())
    for one in sent:
        one.cpu -= 1e6  # the clock of another process
    before = cost.read(run)["cpu_seconds"]
    with pytest.MonkeyPatch.context() as other:
        other.setattr(cost, "_open", [])
        cost.carry_on(sent)
        sent[0].save()
    assert cost.read(run)["cpu_seconds"] < before + 5


DAMAGED = ["[]", "x", "{}", '{"seconds": 1}', '{"seconds": 1, "gpu_seconds": null}']
DAMAGED += [f'{{"seconds": 1, "gpu_seconds": 0, "noted": {value}}}' for value in ("{}", "null", "1e308", '"x"')]
DAMAGED += ['{"seconds": 1e999, "gpu_seconds": 0}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_account_is_named(run, text):
    run.write(cost.COST, text.encode())
    with pytest.raises(UserError, match=r"cost\.json is damaged"), cost.account(run):
        pytest.fail("it was opened")
    assert run.read(cost.COST) == text.encode()


def test_a_process_that_works_for_a_waiting_one_notes_in_its_accounts(run, clock, monkeypatch):
    with cost.account(run, "chain.json"), cost.account(run), cost.holding(8):
        clock.pass_s(3)
        sent = copy.deepcopy(cost.opened())
        with monkeypatch.context() as other:
            other.setattr(cost, "_open", [])
            cost.carry_on(sent)
            clock.pass_s(4)
            cost.note()
        assert spent(run) == spent(run, "chain.json") == (7, 56)  # what is there if both are killed now
        clock.pass_s(1)
    assert spent(run) == spent(run, "chain.json") == (8, 64)


KILLED = """
import os, signal, sys, time
from ttmray import cost
from ttmray.storage import Folder
with cost.account(Folder(sys.argv[1])), cost.holding(2):
    time.sleep(0.2)
    cost.note()
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_launches_that_are_killed_add_up_to_their_last_commits(run):
    before = 0.0
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED, run.uri], env=os.environ)
        assert done.returncode == -signal.SIGKILL
        seconds, gpu_seconds = spent(run)
        assert before + 0.2 <= seconds < before + 5
        assert gpu_seconds == pytest.approx(2 * seconds, rel=0.05)
        before = seconds


def test_gpus_of_actors_are_those_of_the_actors_that_there_are():
    def ray(**sets: float) -> ActorsConfig:
        return ActorsConfig(runner="ray", device="cuda", **sets)

    assert gpus_held(ray(workers=4, gpus=0.5), items=100) == 2
    assert gpus_held(ray(workers=4, gpus=0.5), items=3) == 1.5
    assert gpus_held(ray(workers=4), items=100) == 0
    assert gpus_held(ActorsConfig(device="cuda:1", workers=4, gpus=1), items=100) == 1
    assert gpus_held(ActorsConfig(device="cpu", workers=4, gpus=1), items=100) == 0


def test_work_over_items_notes_each_one_that_is_done(run, clock):
    def work(item: int) -> int:
        clock.pass_s(item)
        return item

    def noted() -> Iterator[tuple[float, float]]:
        with cost.account(run):
            for _ in each(lambda: work, [5, 7], ActorsConfig(device="cuda")):
                yield spent(run)
            clock.pass_s(100)

    assert list(noted()) == [(5, 5), (12, 12)]
    assert spent(run) == (112, 12)


@pytest.mark.slow
def test_gpus_of_ray_actors_count_while_they_work(run, clock):
    import ray

    ray.init(address="local", num_cpus=2, num_gpus=4, include_dashboard=False, logging_level="ERROR")
    config = ActorsConfig(runner="ray", device="cpu", workers=2, gpus=2)
    try:
        with cost.account(run):
            for _ in each(lambda: lambda item: item, range(3), config):
                clock.pass_s(1)
            clock.pass_s(10)
    finally:
        ray.shutdown()
    assert spent(run) == (13, 12)
