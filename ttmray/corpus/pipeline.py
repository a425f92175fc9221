"""Run the stages over units: a plain local runner and a Ray Data runner over one set of stages.

Ray is left to place work, restart actors, apply back-pressure and move units between processes. What must be
exact (names, commits, retries of killers, quarantine) is ours and the same for both runners.
"""

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ttmray import cost
from ttmray.cluster import connect
from ttmray.corpus import index
from ttmray.corpus.assembly import CorpusJob
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.guard import MAX_ATTEMPTS, guarded
from ttmray.corpus.placement import gpus_held, least_cpus, place
from ttmray.corpus.running import Job, run_stages
from ttmray.corpus.stage import AT_HOME, Stage, alive, reads
from ttmray.corpus.unit import FAILED, Unit, merge
from ttmray.corpus.worker import ChildWorker, WorkerDied
from ttmray.errors import ClipError, UserError
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
            return Unit(part.name, [track], [row])
        part.rows = before
        part.drop({0: error}, stage.name)
        return part


class StageWorker:
    """The stages of one process, with the crash guard around them. Also the class of the Ray actors."""

    def __init__(self, job: str, name: str, stages: Sequence[str]) -> None:
        self.job = Job.from_json(job)
        self.name, self.names = name, tuple(stages)
        self.run = Folder.at(self.job.output)
        self.chain = self.job.build(stages)

    def on_unit(self, unit: Unit) -> Unit:
        return guarded(
            self.run,
            self.name,
            unit,
            lambda it: run_stages(self.chain, it),
            lambda it: run_alone(self.job, self.names, it, self.job.clip_timeout_s),
        )

    def __call__(self, table: Any) -> Any:
        unit = self.on_unit(Unit.from_table(table))
        return unit.to_table()


Done = Callable[[Unit], None]


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
    waiting: queue.SimpleQueue[Unit] = queue.SimpleQueue()
    for unit in units:
        waiting.put(unit)
    finished: queue.SimpleQueue[Unit | BaseException] = queue.SimpleQueue()
    stop = threading.Event()
    config = job.corpus
    run, names = Folder.at(config.output), [stage.name for stage in job.stages()]
    workers = [ChildWorker(job.to_json(), names) for _ in range(count)]

    def until_committed(worker: ChildWorker, unit: Unit) -> Unit:
        timeout_s = config.runtime.clip_timeout_s * max(config.unit_clips, 1)
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
                unit = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                finished.put(until_committed(worker, unit))
            except BaseException as error:  # handed to the caller's thread, which raises it
                finished.put(error)
                return

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        for _ in units:
            result = finished.get()
            if isinstance(result, BaseException):
                raise result
            done(result)
    finally:
        stop.set()
        for worker in workers:
            worker.kill()


def run_ray(job: CorpusJob, units: Sequence[Unit], done: Done) -> None:
    """Run units on Ray Data: one row per unit, one operator per group of stages."""
    import ray.data  # named, because it gives its loggers their handlers when it is first imported

    config = job.corpus
    _connect(config)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)  # errors arrive as exceptions, and its own files keep all
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts clips and knows the whole plan
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = config.runtime.no_progress_timeout_s
    context.max_errored_blocks = 0  # a lost block would be lost clips
    dataset = ray.data.from_blocks([unit.to_table() for unit in units])
    cluster = ray.cluster_resources()
    gpus = cluster.get("GPU", 0)
    groups = place(config, cluster.get("CPU", 0), gpus, len(units))
    for group in groups:
        dataset = dataset.map_batches(
            StageWorker,
            fn_constructor_args=(job.to_json(), group.name, group.stages),
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(min_size=group.fewest, max_size=group.most),
            num_cpus=group.cpus,
            num_gpus=group.gpus or None,
        )
    try:
        with cost.holding(gpus_held(groups, gpus)):
            for table in dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
                done(Unit.from_table(table))
    except ray.exceptions.RayError as error:
        raise _root_cause(error) from error


def _connect(config: CorpusConfig) -> None:
    """Join the cluster that RAY_ADDRESS names (set by `ray job submit`), else start a local instance."""
    workers = config.runtime.workers
    cores = workers if isinstance(workers, int) and workers > 0 else os.cpu_count() or 1
    # logical CPUs: a small machine must be able to hold one worker of each group
    connect(max(cores, least_cpus(config)), object_store_gib=config.runtime.object_store_gib)


def _root_cause(error: BaseException) -> BaseException:
    """The UserError inside Ray's wrappers, if there is one."""
    seen: set[int] = set()
    node: BaseException | None = error
    while node is not None and id(node) not in seen:
        seen.add(id(node))
        if isinstance(node, UserError):
            return node
        node = getattr(node, "cause", None) or node.__cause__
    return error
