"""Ray for everybody else: join or start a cluster, and do the same work over many items.

Only this file, `corpus/ray_runner.py` (Ray Data) and `training/launch.py` (Ray Train) import Ray.
"""

import gc
import logging
import math
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field

from ttmray import cost
from ttmray.config import Config, Device
from ttmray.console import OURS, console, errors
from ttmray.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
RAY_LEVEL = "RAY_BACKEND_LOG_LEVEL"
TRIED_AGAIN = ("so the task will be retried", "A worker died or was killed while executing a task")
"""In what Ray's daemons tell drivers about workers that die."""
RETRIES = 3
"""How often work is tried again that its worker died of. Workers are started again without end: in a run of days many
may die, each of something else."""


STEPS = 10_000
"""Ray counts CPUs and GPUs in parts of so many."""


def _in_steps(value: float) -> float:
    if abs(value * STEPS - round(value * STEPS)) > 1e-6:
        raise ValueError(f"has more than four decimals, as in {int(value * STEPS) / STEPS:g}")
    return value


def _whole(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("must be a share of one GPU or a whole number of them")
    return value


Cpus = Annotated[float, AfterValidator(_in_steps)]
Gpus = Annotated[float, AfterValidator(_in_steps), AfterValidator(_whole)]
"""What Ray can give to one process; it raises for others only once work is placed."""


class RuntimeConfig(Config):
    """Where a job runs, in the words that all jobs share; none of it changes a result beyond last bits of a device."""

    runner: Literal["local", "ray"] = "local"
    """`local`: on this machine without Ray. `ray` joins the cluster that RAY_ADDRESS names, else starts one here."""
    device: Device = "auto"
    """Of the models; `auto` is cuda where there is one."""


class ActorsConfig(RuntimeConfig):
    """Where work over many items runs: in this process, or in Ray actors."""

    workers: int = Field(1, ge=1)
    """Ray actors; at most one per item."""
    cpus: Cpus = Field(1.0, gt=0)
    """CPUs per actor."""
    gpus: Gpus = Field(0.0, ge=0)
    """GPUs per actor, which has none unless this says so."""

    @property
    def process_cpus(self) -> int:
        """CPUs that one process has: all of this machine, or an actor's share."""
        return (os.cpu_count() or 1) if self.runner == "local" else max(1, int(self.cpus))


def each(make: Callable[[], Callable[[Item], Result]], items: Sequence[Item], config: ActorsConfig) -> Iterator[Result]:
    """Results in any order. `make` builds the work once per process, e.g. loads models; it must pickle.

    Raises:
        Exception: what the work raised, with its own type.
        UserError: GPUs that are not there, or a worker that dies again and again.
    """
    if not items:
        return
    with cost.holding(gpus_held(config, len(items))):
        for result in map(make(), items) if config.runner == "local" else _on_ray(make, items, config):
            cost.note()  # before the caller has it: it is committed already
            yield result


def gpus_held(config: ActorsConfig, items: int) -> float:
    """GPUs that work over so many items holds from its start to its end."""
    return cost.on_cuda(config.device) if config.runner == "local" else min(config.workers, items) * config.gpus


def _on_ray(
    make: Callable[[], Callable[[Item], Result]], items: Sequence[Item], config: ActorsConfig
) -> Iterator[Result]:
    import ray
    from ray.util import ActorPool

    count = min(config.workers, len(items))
    connect(max(math.ceil(count * config.cpus), os.cpu_count() or 1))
    require_gpus(count * config.gpus, "workers x gpus", "Set gpus=0, or fewer workers.")
    remote = ray.remote(num_cpus=config.cpus, num_gpus=config.gpus, max_restarts=-1, max_task_retries=RETRIES)
    actor = remote(_Actor)
    pool = ActorPool([actor.remote(make, config.gpus, config.device) for _ in range(count)])
    try:
        yield from pool.map_unordered(lambda worker, item: worker.work.remote(item), list(items))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        raise UserError(
            f"a worker process died on the same work {RETRIES + 1} times: {error}",
            "Usually memory ran out: use fewer workers, smaller batches or more memory, and start the same command "
            "again. What was made is kept.",
        ) from error


class _Actor:
    def __init__(self, make: Callable[[], Callable[[Any], Any]], gpus: float, device: str) -> None:
        self._make, self._gpus, self._device = make, gpus, device
        self._work: Callable[[Any], Any] | None = None

    def work(self, item: Any) -> Any:
        if self._work is None:  # here, because errors of a constructor lose their type
            require_usable(self._gpus, self._device, "set device=cpu and gpus=0")
            self._work = self._make()
        return self._work(item)


class Relay:
    """What workers print reaches this process: lines of their consoles (`Marked`) are printed as if they were ours,
    and so are a cluster's complaints; the last of all else is kept, for the day that a worker is lost."""

    LINES = 30

    def __init__(self) -> None:
        self._others: deque[str] = deque(maxlen=self.LINES)

    def __call__(self, printed: Mapping[str, Any]) -> None:
        """Args:
        printed: `lines` of one process, and its `pid`, as Ray hands them over.
        """
        for line in printed["lines"]:
            if line.startswith(OURS):
                console.print(line.removeprefix(OURS))
            elif printed.get("pid") == "autoscaler" and ("Error:" in line or "Warning:" in line):
                errors.print(line)
            elif line.strip() and RAY_LEVEL not in line:
                self._others.append(line)

    def last_words(self) -> str:
        """What is no console's line, newest last; empty where there was none."""
        return "\n".join(self._others)


relay = Relay()


def connect(
    cpus: int, *, object_store_gib: float | None = None, show_workers: bool = False, state_api: bool = False
) -> None:
    """Join the cluster that RAY_ADDRESS names (set by `ray job submit`), else start an instance on this machine.

    Args:
        cpus: logical CPUs that an instance started here has.
        object_store_gib: its object store; default: Ray's own choice (30 % of RAM).
        show_workers: print what workers' consoles print (`Relay`).
        state_api: with Ray's dashboard (on the loopback interface), which Ray Train asks every second whether its
            controller lives; where nobody answers it warns every second.

    Raises:
        UserError: Ray does not start, or the cluster is not there.
    """
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        options = {"address": "local", "include_dashboard": state_api, "num_cpus": cpus}
        if object_store_gib:
            options["object_store_memory"] = int(object_store_gib * 2**30)
    # Ray's own actors have errors that nobody waits for and nobody can act on; what our work raises reaches us
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    on_termination = signal.getsignal(signal.SIGTERM)
    _hush()  # before it prints anything
    with _own_level():
        try:
            joined = ray.init(logging_level=logging.ERROR, log_to_driver=show_workers, **options)
        except Exception as error:  # Ray's own are of many types, and plain ones; each says that there is no cluster
            signal.signal(signal.SIGTERM, on_termination)
            said = str(error).strip().splitlines()
            raise UserError(
                f"Ray did not start: {said[0] if said else type(error).__name__}",
                "A machine that is too busy or has too little memory may need another try; `runtime.runner=local` "
                "works without Ray; RAY_ADDRESS names the cluster to join.",
            ) from error
    signal.signal(signal.SIGTERM, on_termination)  # Ray puts its own in place, which ends without a word
    if joined.dashboard_url:
        console.print(f"Ray's dashboard, with queues and use of GPUs: http://{joined.dashboard_url}", markup=False)
    if show_workers:
        from ray._private.ray_logging import global_worker_stdstream_dispatcher

        global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
        global_worker_stdstream_dispatcher.add_handler("ray_print_logs", relay)  # Ray removes it by this name


def _hush() -> None:
    """What Ray tries again by itself stays off the console: a worker that is started anew is no message for people, and
    work that is given up is an exception. Ray has no setting for this: what its daemons tell drivers of workers that
    died is printed whatever `log_to_driver` says. All else that they tell, of memory above all, is printed as before.
    """
    from ray._private import worker

    if not isinstance(worker.print_to_stdstream, _Filter):
        worker.print_to_stdstream = _Filter(worker.print_to_stdstream)


class _Filter:
    """Ray's own printer, but for lines about workers that died, which are kept by `relay`, and about our own level."""

    def __init__(self, printer: Callable[..., None]) -> None:
        self._printer = printer

    def __call__(self, data: dict[str, Any], ignore_prefix: bool = False) -> None:
        lines = [line for line in data["lines"] if RAY_LEVEL not in line]
        of_raylet = data.get("pid") == "raylet"
        if of_raylet and all(any(words in line for words in TRIED_AGAIN) for line in lines):
            relay(data)
        elif lines:
            self._printer(data | {"lines": lines}, ignore_prefix)


@contextmanager
def _own_level() -> Iterator[None]:
    """Ray's C++ side, which starts inside, is silent below fatal errors unless the user says otherwise.

    Whatever actor gets an object, as all of Ray Data's do, it prints an error line that nobody can act on. What ends
    work arrives as an exception. That the level was set is a line, too, which goes into a file in place of the console.
    """
    if os.environ.get(RAY_LEVEL):
        yield
        return
    os.environ[RAY_LEVEL] = "fatal"
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            del os.environ[RAY_LEVEL]
            held.seek(0)
            for line in held:
                if RAY_LEVEL.encode() not in line:
                    os.write(2, line)


def require_usable(gpus: float, device: str, on_cpus: str) -> None:
    """See, in a worker, that torch can use the GPUs that Ray gave to it: `auto` would be the CPU without a word.

    Args:
        on_cpus: the settings without GPUs, for the message.

    Raises:
        UserError: it cannot.
    """
    if not gpus or device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"Ray gave {gpus:g} GPUs to a worker, but torch finds none it can use.",
            f"Usually the driver is older than torch's CUDA. To run on CPUs, {on_cpus}.",
        )


def require_gpus(needed: float, field: str, way_out: str) -> None:
    """See that what is asked for can be had, because Ray waits for it without end.

    Args:
        needed: GPUs in all.
        field: of the config that asks for them.
        way_out: for the message.

    Raises:
        UserError: an instance started here has fewer. A cluster may grow; there it is only said what is awaited.
    """
    import ray

    have = ray.cluster_resources().get("GPU", 0.0)
    if needed <= have:
        return
    if not os.environ.get("RAY_ADDRESS"):
        raise UserError(f"{field} needs {needed:g} GPUs, this machine has {have:g}.", way_out)
    console.print(f"waiting for GPUs: {field} needs {needed:g}, the cluster has {have:g} now", markup=False)


def leave() -> None:
    """Leave the cluster, and end it if this process started it."""
    if "ray" in sys.modules:
        import ray

        ray.shutdown()


def connected() -> bool:
    """Whether this process has joined a cluster."""
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())


@contextmanager
def alone() -> Iterator[None]:
    """Afterwards torch's threads, GPU memory and Ray are as before: what comes next shall not feel the work inside.

    A cluster that was joined before stays joined.
    """
    import torch

    threads, joined = torch.get_num_threads(), connected()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if not joined:
            leave()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
