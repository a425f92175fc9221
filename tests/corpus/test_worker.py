"""The child process: how it answers, fails, dies and is started again."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import pytest

from ttmray.corpus import worker as worker_module
from ttmray.corpus.assembly import CorpusJob
from ttmray.corpus.unit import FAILED, OK, Unit
from ttmray.corpus.worker import ChildWorker, WorkerDied, WorkerError
from ttmray.errors import UserError

TIMEOUT_S = 120.0


def children() -> set[int]:
    """Process ids of our children, zombies included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find children")


@pytest.fixture
def unit_and_job(songs, make_config, prepare, tmp_path) -> tuple[Unit, CorpusJob]:
    job, _, (unit, *_) = prepare(make_config(songs, tmp_path / "run", "unit_clips=8"))
    return unit, job


@pytest.fixture
def unit(unit_and_job) -> Unit:
    return unit_and_job[0]


@pytest.fixture
def before() -> set[int]:
    resource_tracker.ensure_running()  # multiprocessing's own helper, one for the life of this process
    return children()


@pytest.fixture
def worker(unit_and_job, before) -> Iterator[ChildWorker]:
    """Decodes; models would only make it slow."""
    made = ChildWorker(unit_and_job[1].to_json(), ("decode",))
    yield made
    made.kill()
    assert children() == before, "no child is left, not even as a zombie"


def only(found: set[int]) -> int:
    (pid,) = found
    return pid


def test_a_child_answers_again_and_again(worker, unit, before):
    first = worker.run(unit, TIMEOUT_S)
    pid = only(children() - before)
    again = worker.run(unit, TIMEOUT_S)
    assert {row["status"] for row in first.rows} == {OK, FAILED}
    assert first.rows == again.rows
    np.testing.assert_array_equal(first.clips["mix"], again.clips["mix"])
    assert children() - before == {pid}
    assert unit.rows == [], "the caller's unit stays as it was"


def test_a_child_killed_between_units_is_named_with_its_signal_and_replaced(worker, unit, before):
    first = worker.run(unit, TIMEOUT_S)
    pid = only(children() - before)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied) as caught:
        worker.run(unit, TIMEOUT_S)
    assert caught.value.how == "was killed by SIGKILL"
    assert worker.run(unit, TIMEOUT_S).rows == first.rows
    assert children() - before != {pid}


@pytest.fixture
def endless(unit, unit_and_job, tmp_path) -> tuple[Unit, ChildWorker, Path]:
    """A unit whose only song is a pipe: its decoder waits until somebody writes."""
    pipe = tmp_path / "endless.wav"
    os.mkfifo(pipe)
    job = replace(unit_and_job[1], root=str(tmp_path))
    return Unit("u0", [unit.tracks[0] | {"path": pipe.name}]), ChildWorker(job.to_json(), ("decode",)), pipe


def test_a_child_killed_in_the_middle_of_a_unit_is_one_death(endless, before):
    unit, worker, pipe = endless
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(worker.run, unit, TIMEOUT_S)
        running.add_done_callback(lambda _: os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)))  # no endless wait
        with open(pipe, "wb"):  # opens when the decoder does
            os.kill(only(children() - before), signal.SIGKILL)
            with pytest.raises(WorkerDied, match="killed by SIGKILL"):
                running.result()
    assert children() == before


def test_a_child_that_does_not_answer_in_time_is_ended(endless, before):
    unit, worker, _ = endless
    with pytest.raises(WorkerDied) as caught:
        worker.run(unit, 0.5)
    assert caught.value.how == "no answer within 0.5 s"
    assert children() == before


def test_a_child_that_is_ended_while_another_thread_waits_for_it_dies_once(endless, before):
    """As at Ctrl-C: the thread of the child and the one that ends it take leave of it at the same moment."""
    unit, worker, _ = endless
    with ThreadPoolExecutor(8) as pool:
        waiting = pool.submit(worker.run, unit, TIMEOUT_S)
        until = time.monotonic() + TIMEOUT_S
        while children() == before:
            assert time.monotonic() < until
            time.sleep(0.01)
        for ended in [pool.submit(worker.kill) for _ in range(7)]:
            assert ended.result() is None
        with pytest.raises((WorkerDied, UserError)):  # at work, or just starting
            waiting.result()


def test_an_error_in_the_child_arrives_with_its_traceback_and_the_child_lives_on(worker, unit, before):
    broken = Unit("u0", [{"track_id": "no more than that"}])
    with pytest.raises(WorkerError) as caught:
        worker.run(broken, TIMEOUT_S)
    assert "Traceback" in str(caught.value)
    assert "KeyError: 'status'" in str(caught.value)
    pid = only(children() - before)
    assert worker.run(unit, TIMEOUT_S).ok_rows()
    assert children() - before == {pid}


def test_a_user_error_in_the_child_arrives_as_one(unit_and_job, unit):
    job = unit_and_job[1]
    config = job.corpus.model_copy(update={"bundle": "nowhere"})
    worker = ChildWorker(replace(job, config=config.model_dump_json()).to_json(), ("separate",))
    try:
        with pytest.raises(UserError, match="no bundle 'nowhere'") as caught:
            worker.run(unit, TIMEOUT_S)
        assert "debug" in caught.value.hint
    finally:
        worker.kill()


def test_killing_a_worker_that_never_started_or_is_dead_does_nothing(worker, unit):
    worker.kill()
    worker.run(unit, TIMEOUT_S)
    worker.kill()
    worker.kill()


def test_a_child_whose_parent_is_gone_ends_quietly(unit_and_job, capfd):
    job = unit_and_job[1]
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=worker_module._serve, args=(theirs, job.to_json(), ("decode",)))
    child.start()
    theirs.close()
    assert ours.recv_bytes() == b"ready"
    ours.close()
    child.join(TIMEOUT_S)
    assert child.exitcode == 0
    assert capfd.readouterr().err == ""


def test_a_program_that_starts_a_job_is_not_run_again_by_its_workers(unit_and_job, unit, tmp_path):
    """Spawned processes import the main module, and most people's has no guard."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from ttmray.corpus.unit import Unit\n"
        "from ttmray.corpus.worker import ChildWorker\n"
        "print('started', flush=True)\n"
        "worker = ChildWorker(sys.argv[1], ('decode',))\n"
        f"print(len(worker.run(Unit('u0', {unit.tracks[:1]!r}), {TIMEOUT_S}).rows))\n"
        "worker.kill()\n"
    )
    command = [sys.executable, str(program), unit_and_job[1].to_json()]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
    assert printed.split()[0::2] == ["started"]
    assert int(printed.split()[1]) == 2
