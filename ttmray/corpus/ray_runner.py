"""The Ray Data runner: one row per unit, one operator per group of stages, in rounds.

Models live in a pool of actors, and everything else runs as tasks: what was lost with a machine is made again wherever
a CPU is free, while an actor's work waits for a place for that very actor. A round ends when all units are done, or
when a machine has to be left out; the next round runs what is left on the machines that there are then. Machines that
go or join within a round are Ray Data's business: pools are ranges.
"""

import gc
import hashlib
import logging
import math
import os
import socket
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import cache, partial
from itertools import islice
from typing import Any, ClassVar

from ttmray import cost
from ttmray.cluster import connect, require_usable
from ttmray.console import console
from ttmray.corpus.assembly import CorpusJob
from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.guard import MAX_ATTEMPTS, guarded
from ttmray.corpus.left_out import LeftOut, WorkerFault
from ttmray.corpus.pipeline import Done, StageWorker, dies_after, unit_timeout_s
from ttmray.corpus.placement import Group, Node, gpus_held, lacking, least_cpus, needs, place
from ttmray.corpus.running import Job
from ttmray.corpus.silence import Silence
from ttmray.corpus.unit import FAILED, REJECTED, Unit
from ttmray.errors import UserError
from ttmray.runs import RUN
from ttmray.storage import Folder, is_remote

POLL_S = 2.0
SAY_AGAIN_S = 60.0
WISH_S = 15.0
ROUND_UNITS = 50_000
SEEN_WITHIN_S = 20.0
"""A shared file system may show a new file so much later on other machines."""


class RayWorker:
    """A `StageWorker` that is built with its first unit, and says on which machine something failed.

    Args:
        job, name, stages: see `StageWorker`.
        gpus: that Ray gives to it.
        run_hash: of the driver's `run.json`.
    """

    def __init__(self, job: str, name: str, stages: Sequence[str], gpus: float, run_hash: str) -> None:
        # nothing can fail here: errors of an actor's constructor lose their type, and Ray tries again without end
        self._made_of = (job, name, stages)
        self._gpus, self._run_hash = gpus, run_hash
        self._worker: StageWorker | None = None

    def __call__(self, table: Any) -> Any:
        try:
            worker = self._worker = self._worker or self._built()
            return worker(table)
        except Exception as error:
            raise _fault(error) from error

    def _built(self) -> StageWorker:
        """The worker; markers count how often its process died on the way, as those of the crash guard do."""
        import ray

        workers: list[StageWorker] = []
        job = Job.from_json(self._made_of[0])
        assert isinstance(job, CorpusJob)
        look_around(job, self._gpus, self._run_hash)  # before anything is written: it may be another folder
        runtime = job.corpus.runtime
        task = str(ray.get_runtime_context().get_task_id())  # the same when Ray tries again

        def build(start: Unit) -> Unit:
            # models that hang on a sick GPU must not hold it for ever
            with dies_after(runtime.no_progress_timeout_s):
                workers.append(StageWorker(*self._made_of, unit_timeout_s(job.corpus)))
            return start

        guarded(Folder.at(job.output), task, Unit("start", []), build, _refused)
        return workers[0]


@cache
def _worker(*of: Any) -> RayWorker:
    """The worker of this process for the tasks of a group; see `RayWorker`."""
    return RayWorker(*of)


def work(table: Any, *of: Any) -> Any:
    """A task: stages without models over a unit. See `RayWorker`."""
    return _worker(*of)(table)


def _refused(_: Unit) -> Unit:
    raise UserError(
        f"The process of a worker died {MAX_ATTEMPTS} times while its stages were built.",
        "Usually memory ran out: use fewer workers, or nodes with more memory.",
    )


def look_around(job: Job, gpus: float, run_hash: str, within_s: float = SEEN_WITHIN_S) -> None:
    """See that this machine has what a worker needs.

    Args:
        gpus: that Ray gives to it.
        run_hash: of the driver's `run.json`.
        within_s: how long to wait for `run.json`.

    Raises:
        UserError: it sees another run folder than the driver, or no songs, or no GPU though it has one.
    """
    run, deadline = Folder.at(job.output), time.monotonic() + within_s
    while _run_hash(run) != run_hash:
        if time.monotonic() >= deadline:
            raise UserError(
                f"{run.path(RUN)} is not there, or not the same as where the job was started.",
                "Every node must see the output folder: use a shared file system or a bucket.",
            )
        time.sleep(1.0)
    if job.root and not is_remote(job.root) and not os.path.isdir(job.root):
        raise UserError(
            f"{job.root}: there is no such folder.",
            "Every node must see the songs: use a shared file system or a bucket.",
        )
    if isinstance(job, CorpusJob):
        require_usable(gpus, job.corpus.runtime.device, "set runtime.device=cpu and runtime.models.gpus=0")


def _run_hash(run: Folder) -> str:
    """SHA-256 of `run.json`; empty where there is none."""
    return hashlib.sha256(run.read(RUN)).hexdigest() if run.exists(RUN) else ""


def _fault(error: Exception) -> WorkerFault:
    import ray

    node = ray.get_runtime_context().get_node_id()
    where = f"{socket.gethostname()} (node {node[:8]})"
    if isinstance(error, UserError):
        return WorkerFault(node, where, error.message, error.hint, True)
    return WorkerFault(node, where, f"{type(error).__name__}: {error}", "", False)


def run_ray(job: CorpusJob, units: Sequence[Unit], done: Done) -> None:
    """Run units on Ray Data; `done` gets each committed unit.

    Raises:
        UserError: what every machine would meet; or there is no place for some group, or too many machines fail.
    """
    _connect(job.corpus)
    run, left_out, wishes, metrics = Folder.at(job.output), LeftOut(), Wishes(), Metrics(job.output)
    run_hash = _run_hash(run)
    left = dict.fromkeys(unit.name for unit in units)
    try:
        while left:
            # the driver holds what is in a round, so there is a bound to it; each one loads the models anew
            of_round = list(islice((unit for unit in units if unit.name in left), ROUND_UNITS))
            groups = _places(job.corpus, left_out, len(left), wishes)
            silence = Silence(run, partial(_places_free, groups), job.corpus.runtime.no_progress_timeout_s)
            try:
                # closed, so that no worker of a round goes on when it has ended, in whatever way
                with (
                    silence,
                    closing(_round(job, of_round, groups, sorted(left_out.nodes), run_hash)) as committed,
                ):
                    for unit in committed:
                        # a unit comes twice where Ray made it again for something that was lost
                        if unit.name in left:
                            del left[unit.name]
                            silence.broken()
                            left_out.progress()
                            metrics.committed(unit, len(left))
                            done(unit)
                        if _joined() and wishes.due():
                            wishes.ask(_growing(groups, left_out, len(left)), left_out)
                if lost := sum(unit.name in left for unit in of_round):
                    raise _RoundEnded(RuntimeError(f"{lost} units did not come back, and nothing says why"))
            except _RoundEnded as ended:
                _judge(ended.why, left_out, groups)
            # What a failed round leaves behind, its traceback above all, refers to itself and to the actors, which hold
            # their GPUs as long as anybody refers to them: the next round would wait for Python's next full collection.
            gc.collect()
    finally:
        wishes.end()


def _judge(why: Exception, left_out: LeftOut, groups: Sequence[Group]) -> None:
    """What the end of a round means for the next one. Nothing that refers to the round outlives this call."""
    inside = _innermost(why)
    if isinstance(inside, WorkerFault):
        left_out.leave_out(inside, _nodes(), groups, why)
    else:
        left_out.start_again(inside)


class _RoundEnded(Exception):
    """Ray Data gave up, and why."""

    def __init__(self, why: Exception) -> None:
        super().__init__(str(why))
        self.why = why


def _round(
    job: CorpusJob, units: Sequence[Unit], groups: Sequence[Group], left_out: Sequence[str], run_hash: str
) -> Generator[Unit, None, None]:
    """Units as they are committed.

    Args:
        left_out: ids of machines on which nothing is placed.
        run_hash: of `run.json`.

    Raises:
        _RoundEnded: not all came.
    """
    import ray

    _quiet(job.corpus)
    dataset = ray.data.from_blocks([unit.to_table() for unit in units])
    for group in groups:
        of = (job.to_json(), group.name, group.stages, group.gpus, run_hash)
        how: dict[str, Any]
        if group.heavy:
            pool = ray.data.ActorPoolStrategy(min_size=group.fewest, max_size=group.most, initial_size=group.begin)
            how = {"fn": RayWorker, "fn_constructor_args": of, "compute": pool}
        else:
            tasks = ray.data.TaskPoolStrategy(size=group.most)
            # 0: processes live on, as they do anyway; said, it keeps Ray Data from fusing tasks with the next group
            how = {"fn": work, "fn_args": of, "compute": tasks, "max_calls": 0}
        dataset = dataset.map_batches(
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=group.cpus,
            num_gpus=group.gpus or None,
            **how,
            **_elsewhere(left_out),
        )
    with cost.holding(gpus_held(groups, ray.cluster_resources().get("GPU", 0))):
        tables = iter(dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0))
        while True:
            try:
                table = next(tables, None)
            except Exception as error:
                raise _RoundEnded(error) from error
            if table is None:
                return
            yield Unit.from_table(table)


def _elsewhere(nodes: Sequence[str]) -> dict[str, Any]:
    """Options of a task or actor that is not placed on some machines."""
    return {"label_selector": {"ray.io/node-id": f"!in({','.join(nodes)})"}} if nodes else {}


def _quiet(config: CorpusConfig) -> None:
    """Ray Data's settings. What it says is in its files; what it gives up for is raised, and said once, by us."""
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts clips and knows the whole plan
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = config.runtime.no_progress_timeout_s
    context.max_errored_blocks = 0  # a lost block would be lost clips
    # An actor that waits for a slow decoder is not given up: the next one would load its models again.
    context.autoscaling_config.actor_pool_util_downscaling_threshold = -1.0
    # Ray Data's own exception around a fault has it as `__cause__` only, which does not survive pickling
    context.raise_original_map_exception = True


class Metrics:
    """Metrics of Ray, which the driver's machine serves to Prometheus, of the units that are committed.

    A rate of `ttmray_stage_seconds` is how many units are in a stage (`wall`), wait for it (`waited`) or are at its
    GPUs (`gpu`) on average.

    Args:
        run: its address, a tag of all.
    """

    ROWS: ClassVar = {"rows_in": "in", "rows_out": "ok", REJECTED: REJECTED, FAILED: FAILED}

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Counter, Gauge

        tags = {"run": run}
        self._rows = Counter("ttmray_rows", "Rows of a stage by what came of them.", ("run", "stage", "outcome"))
        self._seconds = Counter("ttmray_stage_seconds", "What units spent at a stage.", ("run", "stage", "kind"))
        self._left = Gauge("ttmray_units_left", "Units that are not committed.", ("run",))
        for metric in (self._rows, self._seconds, self._left):
            metric.set_default_tags(tags)

    def committed(self, unit: Unit, left: int) -> None:
        """Count a unit.

        Args:
            left: units that are still to be made.
        """
        self._left.set(left)
        for stage, times in unit.timing.items():
            for name, value in times.items():
                kind, of_seconds, _ = name.rpartition("_s")
                if value > 0 and name in self.ROWS:
                    self._rows.inc(value, {"stage": stage, "outcome": self.ROWS[name]})
                elif value > 0 and of_seconds:
                    self._seconds.inc(value, {"stage": stage, "kind": kind})


class Wishes:
    """One more place for a worker of some groups, asked for all the time: an autoscaler starts machines for it.

    Ray Data asks for all that it could use at once, which an autoscaler that cannot give all of it refuses as a whole.
    A wish is a task that does nothing. It has a place once there is room, and is then wished for again.
    """

    def __init__(self) -> None:
        self._pending: dict[str, Any] = {}
        self._asked = -math.inf

    def due(self) -> bool:
        """Whether it is time to look again."""
        return time.monotonic() - self._asked >= WISH_S

    def ask(self, groups: Sequence[Group], left_out: LeftOut) -> None:
        """Wish for one more worker of each of the groups, and of no other."""
        import ray

        self._asked = time.monotonic()
        for name in self._pending.keys() - {group.name for group in groups}:
            ray.cancel(self._pending.pop(name), force=True)
        for group in groups:
            if group.name in self._pending:
                ready, _ = ray.wait([self._pending[group.name]], timeout=0)
                if not ready:
                    continue
            place_of_one = {"num_cpus": group.cpus, "num_gpus": group.gpus or None, "max_retries": 0}
            wish = ray.remote(_nothing).options(**place_of_one, **_elsewhere(sorted(left_out.nodes)))
            self._pending[group.name] = wish.remote()

    def end(self) -> None:
        """Ask for nothing any more."""
        import ray

        for pending in self._pending.values():
            ray.cancel(pending, force=True)
        self._pending.clear()


def _nothing() -> None:
    return


def _places(config: CorpusConfig, left_out: LeftOut, units: int, wishes: Wishes) -> list[Group]:
    """The groups, once each has a place. A cluster is waited for: it may be about to start machines.

    Raises:
        UserError: an instance that was started here has no place, or the cluster has none in time.
    """
    since, said = time.monotonic(), -math.inf
    while True:
        nodes = left_out.usable(_nodes())
        groups = place(config, nodes, units)
        without = lacking(groups, nodes)
        if not without:
            return groups
        have = f"{sum(node.cpus for node in nodes):g} CPUs and {sum(node.gpus for node in nodes):g} GPUs"
        if not _joined() or time.monotonic() - since > config.runtime.no_progress_timeout_s:
            raise UserError(
                f"A worker of {needs(without)}; Ray has {have}.",
                "Lower runtime.<stage>.cpus, gpus or workers, or set runtime.fuse=all.",
            )
        if time.monotonic() - said >= SAY_AGAIN_S:
            said = time.monotonic()
            console.print(f"waiting for nodes: a worker of {needs(without)}; the cluster has {have}", markup=False)
        if wishes.due():
            wishes.ask(without, left_out)
        time.sleep(POLL_S)


def _places_free(groups: Sequence[Group]) -> str:
    """What workers need and what is free, in words."""
    import ray

    free, have = ray.available_resources(), ray.cluster_resources()
    there = " and ".join(f"{free.get(kind, 0):g} of {have.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
    return f"a worker of {needs(groups)}, and Ray has {there} free"


def _joined() -> bool:
    """Whether it is a cluster that was there before, and may grow."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _growing(groups: Sequence[Group], left_out: LeftOut, units: int) -> list[Group]:
    """Groups with models that could use a further machine for the units that are left."""
    nodes = left_out.usable(_nodes())
    return [
        group for group in groups if group.heavy and sum(group.fits(node) for node in nodes) < min(group.most, units)
    ]


def _nodes() -> list[Node]:
    """The machines that are alive."""
    import ray

    return [
        Node(
            node["NodeID"],
            f"{node['NodeManagerHostname']} (node {node['NodeID'][:8]})",
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _connect(config: CorpusConfig) -> None:
    """Join the cluster that RAY_ADDRESS names (set by `ray job submit`), else start a local instance."""
    workers = config.runtime.workers
    cores = workers if isinstance(workers, int) and workers > 0 else os.cpu_count() or 1
    # logical CPUs: a small machine must be able to hold one worker of each group
    connect(max(cores, least_cpus(config)), object_store_gib=config.runtime.object_store_gib)


def _innermost(error: Exception) -> Exception:
    """What is inside of Ray's wrappers: an error of a task has what the task raised as its `cause`."""
    seen: list[Exception] = []
    while isinstance(error, Exception) and error not in seen:
        seen.append(error)
        error = getattr(error, "cause", error)
    return seen[-1]
