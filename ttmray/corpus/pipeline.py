"""Run the stages over units: the plain local runner, and what the Ray Data runner (`ray_runner.py`) shares with it.

Ray is left to place work, restart actors, apply back-pressure and move units between processes. What must be
exact (names, commits, retries of killers, quarantine) is ours and the same for both runners.
"""

import faulthandler
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from ttmray import cost
from ttmray.corpus import index
from ttmray.corpus.assembly import CorpusJob
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.guard import MAX_ATTEMPTS, guarded
from ttmray.corpus.running import Job, run_stages
from ttmray.corpus.stage import AT_HOME, Stage, alive, reads
from ttmray.corpus.unit import FAILED, Unit, merge
from ttmray.corpus.worker import ChildWorker, WorkerDied
from ttmray.errors import ClipError
from ttmray.storage import Folder


def run_alone(job: Job, names: Sequence[str], unit: Unit, timeout_s: float) -> Unit:
    """Run stages on one track or clip at a time in a child process; whoever kills or hangs it is quarantined.

    Stages of whole units cannot run alone: they run here.
    """
    everything = job.stages()
    left = job.stages(names)
    while left:
        count = 1
        if left[0].scope == "unit":
            unit = run_stages(job.build([left[0].name]), unit)
        else:
            # whole tracks must not leave their process: they are decoded where they are separated
            while AT_HOME & alive(everything, everything.index(left[count - 1]) + 1):
                count += 1
            unit = _one_by_one(job, left[:count], unit, timeout_s)
            unit.keep(reads(everything[everything.index(left[count - 1]) + 1 :]))
        left = left[count:]
    return unit


def _one_by_one(job: Job, stages: Sequence[type[Stage]], unit: Unit, timeout_s: float) -> Unit:
    worker = ChildWorker(job.to_json(), [stage.name for stage in stages])
    try:
        parts = [_survivor(job, worker, stages[0], part, timeout_s) for part in _suspects(stages[0], unit)]
    finally:
        worker.kill()
    return merge(unit, parts)


def _suspects(stage: type[Stage], unit: Unit) -> Iterator[Unit]:
    if stage.scope == "track":
        for track in unit.tracks:
            yield Unit(unit.name, [track])
    else:
        for row in unit.ok_rows():
            yield unit.part({row["track_id"]}, {row["key"]})


def _survivor(job: Job, worker: ChildWorker, stage: type[Stage], part: Unit, timeout_s: float) -> Unit:
    before = [dict(row) for row in part.rows]
    try:
        return worker.run(part, timeout_s)
    except WorkerDied as death:
        error = ClipError(FAILED, "killed", f"its process {death.how} in {MAX_ATTEMPTS} attempts, and once more alone")
        if stage.scope == "track":
            (track,) = part.tracks
            row = index.new_row(track, part.name, job.protocol)
            row.update(status=error.status, stage=stage.name, reason=error.reason, message=error.message)
            part = Unit(part.name, [track], [row])
        else:
            part.rows = before
            part.drop({0: error}, stage.name)
        part.timing = {stage.name: {"rows_in": 1, FAILED: 1}}
        return part


LONGEST_S = 1e9
"""More than Python's timer takes is a mistake; this is thirty years."""


@contextmanager
def dies_after(timeout_s: float) -> Iterator[None]:
    """A block that takes longer ends this process, also where it hangs in C code: a death, which the guard counts.

    Where all threads stood is in the file of the process's errors.
    """
    faulthandler.dump_traceback_later(min(timeout_s, LONGEST_S), exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class StageWorker:
    """The stages of one process, with the crash guard around them.

    Args:
        timeout_s: a unit that takes longer ends the process; default: none does.
    """

    def __init__(self, job: str, name: str, stages: Sequence[str], timeout_s: float | None = None) -> None:
        self.job = Job.from_json(job)
        self._timeout_s = timeout_s
        self.name, self.names = name, tuple(stages)
        self.run = Folder.at(self.job.output)
        self.chain = self.job.build(stages)
        self.commits = stages[-1] == self.job.stages()[-1].name

    def on_unit(self, unit: Unit) -> Unit:
        return guarded(
            self.run,
            self.name,
            unit,
            self._in_time,
            lambda it: run_alone(self.job, self.names, it, self.job.clip_timeout_s),
        )

    def _in_time(self, unit: Unit) -> Unit:
        with dies_after(self._timeout_s) if self._timeout_s else nullcontext():
            return run_stages(self.chain, unit)

    def __call__(self, table: Any) -> Any:
        unit = Unit.from_table(table)
        since = unit.handed_on and time.time() - unit.handed_on
        unit = self.on_unit(unit)
        if since:
            unit.timing.setdefault(self.chain.stages[0].name, {})["waited_s"] = max(0.0, since)  # clocks differ
        unit.handed_on = time.time()
        return (unit.told() if self.commits else unit).to_table()


Done = Callable[[Unit], None]


def unit_timeout_s(config: CorpusConfig) -> float:
    """A unit that takes longer has hung."""
    return config.runtime.clip_timeout_s * max(config.unit_clips, 1)


def whole_worker(job: str) -> Callable[[Unit], Unit]:
    """What runs all stages of a job on a unit in this process: as Ray actors outside of Ray Data do."""
    return StageWorker(job, "all", [stage.name for stage in Job.from_json(job).stages()]).on_unit


def run_local(job: CorpusJob, units: Sequence[Unit], done: Done) -> None:
    """Run units in this process (`workers: 0`) or in child processes; `done` gets each committed unit."""
    config = job.corpus
    workers = config.runtime.workers
    count = (os.cpu_count() or 1) if workers == "auto" else workers
    with cost.holding(cost.on_cuda(config.runtime.device)):
        if count == 0:
            work = whole_worker(job.to_json())
            for unit in units:
                done(work(unit))
        else:
            _run_processes(job, units, min(count, max(len(units), 1)), done)


def _run_processes(job: CorpusJob, units: Sequence[Unit], count: int, done: Done) -> None:
    waiting, taking = iter(units), threading.Lock()
    finished: queue.SimpleQueue[Unit | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    config = job.corpus
    run, names, timeout_s = Folder.at(config.output), [stage.name for stage in job.stages()], unit_timeout_s(config)
    workers = [ChildWorker(job.to_json(), names) for _ in range(count)]

    def until_committed(worker: ChildWorker, unit: Unit) -> Unit:
        while True:
            try:
                return guarded(
                    run,
                    "all",
                    unit,
                    lambda it: worker.run(it, timeout_s),
                    lambda it: run_alone(job, names, it, config.runtime.clip_timeout_s),
                )
            except WorkerDied:
                if stop.is_set():
                    raise
                continue  # its marker stays, so the guard counts the death

    def serve(worker: ChildWorker) -> None:
        while not stop.is_set():
            try:
                with taking:
                    unit = next(waiting, None)
                if unit is None:
                    return
                finished.put(until_committed(worker, unit))
            except BaseException as error:  # handed to the caller's thread, which raises it
                finished.put(error)
                return

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        for _ in range(len(units)):
            result = finished.get()
            if isinstance(result, BaseException):
                raise result
            done(result)
    finally:
        stop.set()
        for worker in workers:
            worker.kill()
