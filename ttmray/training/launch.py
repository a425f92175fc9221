"""Start a training run: say what will happen, claim the run folder, train here or on Ray Train workers.

Ray Train gives processes, the process group and restarts. Checkpoints and positions are ours, so a restarted worker
group, like a restarted command, goes on from the newest valid checkpoint.
"""

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ttmray import cost, inventory, runs
from ttmray.cluster import connect, relay, require_gpus, require_usable
from ttmray.console import Marked, console
from ttmray.errors import EXIT_OK, UserError
from ttmray.models.bundle import open_bundle
from ttmray.models.devices import resolve_device
from ttmray.models.plans import Row, show_rows
from ttmray.models.speed import NO_GPU, estimate, peak_flops
from ttmray.runs import RUN, SUCCESS
from ttmray.storage import Folder
from ttmray.training.checkpoint import STATE, committed
from ttmray.training.config import LoopConfig, TrainConfig
from ttmray.training.cross_load import report_cross_load
from ttmray.training.data import note_of_corpora
from ttmray.training.export import EXPORTED
from ttmray.training.logbook import METRICS
from ttmray.training.loop import CHECKPOINTS, train, trajectory
from ttmray.training.memory import Split, split_batch
from ttmray.training.task import MakeTask, Ranks, Task

AMPERE = (8, 0)
"""Compute capability from which cards have bfloat16."""
ON_CPUS = "set runtime.device=cpu"
FORCE = "--force goes on with the new ones."


def launch(
    kind: str,
    config: LoopConfig,
    make_task: MakeTask,
    *,
    plan_only: bool = False,
    force: bool = False,
    keep: Callable[[Any, Task, int, torch.device], None] | None = None,
    more_of_plan: Callable[[Any, Any, Split], list[Row]] | None = None,
    after: Callable[[Any, torch.device], None] | None = None,
) -> int:
    """Run, or go on with, a training job; returns the exit code.

    Args:
        kind: of the run, for `run.json`.
        make_task: builds the task of one rank from config and device, without writing; must pickle for Ray.
        plan_only: print every derived number and stop.
        force: go on although the config differs from the run folder's.
        keep: writes what workers and later launches need, once the run folder is known to be this run's; its last
            arguments are the samples per forward and the device of this process or of the workers.
        more_of_plan: further rows of the plan.
        after: work between the last update and the end of the run, in this process.

    Raises:
        UserError: for everything that the user can mend.
        KeyboardInterrupt: Ctrl-C or SIGTERM. The local runner saves first, Ray's workers end at once.
    """
    out, local = Folder.at(config.output), config.runtime.runner == "local"
    if not local and not plan_only:
        actors, cpus = config.beside
        # Ray Train's controller may take one
        needed = math.ceil(config.runtime.workers * config.runtime.cpus + actors * cpus) + 1
        connect(max(needed, os.cpu_count() or 1), show_workers=True, state_api=True)
    if plan_only:
        device, free = _planned_device(config)
    else:
        device, free = _local_device(config) if local else _ray_device(config)
    task = make_task(config, device if local and not plan_only else torch.device("cpu"))
    split = plan(config, task, device, free, more_of_plan)
    described = describe(kind, config, task)
    if plan_only:
        refuse_foreign(out, described, force)
        return EXIT_OK
    if inventory.restore_run(out, kind, "" if force else described["fingerprint"], exact=False) is not None:
        console.print(f"{out.path(RUN)} was missing or damaged and is made again", markup=False)
    claim(out, described, force)
    before = look_at(out)
    out.sweep_temporary(older_than_s=0)  # of a killed launch: one at a time writes to a run folder
    with cost.account(out):
        if isinstance(config, TrainConfig):
            report_cross_load(config, make_task, device)
        if keep is not None:
            keep(config, task, split.device_batch, device)
        with cost.holding(gpus_held(config, device)):
            if local:
                train(task, config, Ranks(), device, split.device_batch, force)
            else:
                del task
                _train_on_ray(config, device, make_task, split.device_batch, force)
        if after is not None:
            after(config, device)
    finish(out, described, config, before)
    console.print(f"curves and samples as a page: ttmray report {out.typed}", markup=False)
    return EXIT_OK


def refuse_foreign(out: Folder, described: dict[str, Any], force: bool = False) -> None:
    """What a plan says of its folder: the same that the run would, without writing.

    Raises:
        UserError: the folder belongs to another run or to something else.
    """
    existing = inventory.existing_or_copy(out, described["kind"])
    if existing is not None and not force:
        runs.refuse_another(out, existing, described, way_out=FORCE)


def gpus_held(config: LoopConfig, device: torch.device) -> int:
    """GPUs of this process or of all Ray workers, which train on `device`."""
    if device.type == "cpu":
        return 0
    return 1 if config.runtime.runner == "local" else config.runtime.workers


def _local_device(config: LoopConfig) -> tuple[torch.device, int | None]:
    """Device of this process, and its free bytes if it is a GPU."""
    device = torch.device(resolve_device(config.runtime.device))
    if config.runtime.threads and device.type == "cpu":
        torch.set_num_threads(config.runtime.threads)
    if device.type == "cpu":
        return device, None
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)  # synchronisation, free memory and generators are those of the current device
    return device, _free_bytes()


def _planned_device(config: LoopConfig) -> tuple[torch.device, int | None]:
    """What a plan is made for: the device that the config asks for, be it here or not, and the free bytes of a GPU
    that is here. No Ray is started for it: its workers are taken to have what this machine has."""
    device = config.runtime.device
    if torch.cuda.is_available() and device != "cpu":
        return torch.device("cuda"), _free_bytes()
    if not device.startswith("cuda"):
        return torch.device("cpu"), None
    console.print(f"runtime.device is {device}, and this machine has no GPU: its memory is not known", style="yellow")
    return torch.device("cuda"), None


def _free_bytes() -> int:
    return int(torch.cuda.mem_get_info()[0])


def plan(
    config: LoopConfig,
    task: Task,
    device: torch.device,
    free: int | None,
    more: Callable[[Any, Any, Split], list[Row]] | None = None,
) -> Split:
    """Micro-batches, memory and work of the run, printed with their reasons.

    Args:
        device: of this process or of the workers.
        free: bytes of a GPU; None for a CPU.
        more: further rows.

    Raises:
        UserError: the estimate is above `runtime.memory_gb`.
    """
    bf16_on_gpu = device.type == "cuda" and torch.cuda.is_available() and config.precision == "bf16"
    if bf16_on_gpu and torch.cuda.get_device_capability(device) < AMPERE:
        console.print(f"{torch.cuda.get_device_name(device)} has no bfloat16: set precision=fp32", style="yellow")
    backbone = task.model.config
    wish, most = config.runtime.device_batch, config.runtime.memory_gb
    if most is not None:
        free = min(int(most * 1e9), free or int(most * 1e9))
    split = split_batch(
        backbone,
        share=config.batch // config.runtime.workers,
        device_batch=None if wish == "auto" else wish,
        averages=len(config.ema.sigma_rels),
        bf16=config.precision == "bf16",
        checkpointing=config.runtime.checkpointing,
        free_bytes=free,
        clips=task.clips_per_sample,
        frozen_models=task.frozen_models,
    )
    trainable = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    workers = config.runtime.workers
    flops = config.steps * config.batch * task.flops_per_sample
    rows = [
        (
            "trainable weights",
            f"{trainable:,}",
            f"{backbone.hidden} wide, {backbone.depth} blocks, head {backbone.head}",
        ),
        ("update", f"{config.batch} samples", f"{workers} workers x {split.accumulation} x {split.device_batch}"),
        (
            "memory per device",
            f"{split.bytes / 2**30:.2f} GiB",
            f"estimate: {split.state_bytes / 2**30:.2f} state + {split.device_batch} x {split.sample_bytes / 2**20:.0f}"
            f" MiB activations{'' if free is None else f', {free / 2**30:.1f} GiB free'}",
        ),
        ("updates", f"{config.steps:,}", f"{config.steps * config.batch:,} samples"),
        (
            "work",
            f"{flops / 1e15:,.3g} PFLOP",
            f"{task.flops_per_sample / 1e9:,.2f} GFLOP per sample, forward and backward",
        ),
        ("time here", *_time(config, device, flops)),
        *([] if more is None else more(config, task, split)),
    ]
    show_rows(rows)
    if most is not None:
        require_memory(split.bytes, most, "training")
    return split


def _time(config: LoopConfig, device: torch.device, flops: float) -> tuple[str, str]:
    """How long a run takes, and why. Workers of a cluster may have GPUs that this machine has not."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "unknown", f"{NO_GPU}; the log has an ETA"
    peak, source = peak_flops(device, config.precision == "bf16")
    return estimate(flops, peak, source, config.runtime.workers if device.type == "cuda" else 1)


def require_memory(needed: float, most: float, phase: str) -> None:
    """Refuse a phase of a run that needs more than `runtime.memory_gb`.

    Args:
        needed: bytes on a device, as estimated.
        most: in 10^9 bytes.

    Raises:
        UserError: it does.
    """
    if needed > most * 1e9:
        raise UserError(
            f"{phase} is estimated to need {needed / 1e9:.1f} GB on a device, runtime.memory_gb is {most:g}.",
            "Set runtime.checkpointing=true, a smaller runtime.device_batch, or more memory.",
        )


def describe(kind: str, config: LoopConfig, task: Task) -> dict[str, Any]:
    """What `run.json` holds."""
    what = {"config": trajectory(config), **task.identity}
    if isinstance(config, TrainConfig):
        note = note_of_corpora(config.data)
    else:  # online tuning: its data are what a bundle makes and scores
        bundle = getattr(getattr(config, "rollouts", None), "bundle", "")
        note = open_bundle(bundle).note if bundle else ""
    return runs.describe(kind, what, config, ("torch", "ray", "numpy"), note=note)


def claim(out: Folder, described: dict[str, Any], force: bool) -> None:
    """Write `run.json`, or check that the folder's run is this one and note its config as it is now.

    Raises:
        UserError: the folder belongs to another run or to something else.
    """
    existing = runs.existing(out, described["kind"])
    if existing is None:
        if runs.write(out, described):
            return
        existing = runs.read(out, described["kind"])  # another process was faster
    if not force:
        runs.refuse_another(out, existing, described, way_out=FORCE)
    out.write(RUN, json.dumps(described | {"created": existing["created"]}, indent=1).encode())
    marker = inventory.read_marker(out) or {}
    ours = marker.get("fingerprint", described["fingerprint"]) == described["fingerprint"]
    if out.exists(SUCCESS) and (marker.get("steps") != described["config"]["steps"] or not ours):
        inventory.clear(out, SUCCESS)  # damaged, or it goes on to more


TRANSITIONS = "transitions"
"""Folder of what a round of online training has drawn: it goes when no checkpoint needs it any more."""


class Before(NamedTuple):
    """What a run folder holds before a launch trains.

    Attributes:
        newest: the newest checkpoint and the version of its `state.json`; empty where there is none.
        noted: files of a finished run as its end has noted them.
        damaged: those that are otherwise: name -> as they are, None: gone.
    """

    newest: tuple[str, ...]
    noted: Mapping[str, inventory.Written]
    damaged: Mapping[str, inventory.Written | None]


def look_at(out: Folder) -> Before:
    """What is there; a run without checkpoints is made again as a whole, so nothing of it is damaged."""
    marker, newest = inventory.read_marker(out), _newest(out)
    if marker is None or not newest:
        return Before(newest, {}, {})
    present = {listed.name for listed in out.files(sizes=False)}
    names = [problem.name for problem in inventory.damage(out, marker) if problem.name != RUN]
    damaged = {name: inventory.entries(out, [name])[name] if name in present else None for name in names}
    return Before(newest, inventory.promised(out, marker), damaged)


def _newest(out: Folder) -> tuple[str, ...]:
    places = out.sub(CHECKPOINTS)
    for name in committed(places)[:1]:
        return (f"{CHECKPOINTS}/{name}/{STATE}", *(file.version for file in places.files(name) if file.name == STATE))
    return ()


def finish(out: Folder, described: dict[str, Any], config: LoopConfig, before: Before) -> None:
    """`_SUCCESS.json`, and where things lie.

    Args:
        before: of `look_at`. What is still damaged, the training could not make again: it is said, and stays noted.
    """
    newest = _newest(out)
    names = [*newest[:1], *(listed.name for listed in out.files(sizes=False) if _is_result(listed.name))]
    noted = before.noted
    fresh = newest != before.newest  # else nothing was trained, and what was noted is as it was
    known = {name: noted[name] for name in names if not fresh and name in noted.keys() - before.damaged.keys() - {RUN}}
    files = known | inventory.entries(out, [name for name in names if name not in known])
    lost = [name for name, was in before.damaged.items() if files.get(name) == was or name == METRICS]
    for name in lost:
        files[name] = noted.get(name, inventory.Written(0, ""))
        console.print(f"{out.path(name)} is missing or damaged, and no checkpoint goes back to it", markup=False)
    if lost:
        console.print(
            f"Weights and newest checkpoint are sound. To have all again, delete {out.path(CHECKPOINTS)} and start the "
            "same command again: it trains from the start.",
            markup=False,
        )
    body = {"steps": config.steps, "samples": config.steps * config.batch}
    inventory.seal(out, runs.read(out, described["kind"]), body, files)
    console.print(f"{config.steps:,} updates, {config.steps * config.batch:,} samples: {out}", markup=False)
    console.print(f"metrics: {out.path(METRICS)}; checkpoints: {out.path(CHECKPOINTS)}", markup=False)
    sigma = config.ema.sigma_rels[0]
    console.print(
        f"inference weights: ttmray checkpoint export {out.typed} --weights ema:{sigma:g} --out model.safetensors",
        markup=False,
    )


def _is_result(name: str) -> bool:
    """Whether the end of a run notes a file. Checkpoints check themselves, as do exported weights."""
    unlisted, folders = (
        (SUCCESS, EXPORTED, "cost.json", "index.html"),
        (CHECKPOINTS, TRANSITIONS, "tensorboard", "wandb"),
    )
    return name not in unlisted and name.partition("/")[0] not in folders


def _ray_device(config: LoopConfig) -> tuple[torch.device, int | None]:
    """Device of the workers, and the free bytes of one of the cluster's GPUs."""
    import ray

    device = config.runtime.device
    if device == "cpu" or (device == "auto" and not ray.cluster_resources().get("GPU")):
        if device == "auto":
            console.print("Ray has no GPU now, so this trains on CPUs; with runtime.device=cuda it would wait for GPUs")
        return torch.device("cpu"), None
    gpus = config.runtime.workers + config.beside[0]
    require_gpus(gpus, "runtime.workers", "Set runtime.device=cpu, or fewer runtime.workers (and samplers).")
    try:
        return torch.device("cuda"), int(ray.get(ray.remote(num_gpus=1)(_free_bytes_there).remote()))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


def _free_bytes_there() -> int:
    require_usable(1, "cuda", ON_CPUS)
    return _free_bytes()


def _train_on_ray(
    config: LoopConfig, device: torch.device, make_task: MakeTask, device_batch: int, force: bool
) -> None:
    """Start workers until the run is done, again where one was lost.

    A new start goes on from the newest checkpoint as every launch does, so Ray Train's own retries have nothing to
    add, and would repeat errors that only the user can mend. Losses are counted from one checkpoint to the next: a run
    of days on machines that come and go is not ended by their number.

    Raises:
        UserError: of a worker, or `max_restarts` did not bring the run to another checkpoint.
    """
    import tempfile

    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    runtime, gpu = config.runtime, device.type == "cuda"
    job = {
        "config": config.model_dump_json(),
        "class": type(config),
        "make_task": make_task,
        "device_batch": device_batch,
        "force": force,
        "accounts": cost.opened(),
        "gpus": int(gpu),
    }
    places = Folder.at(config.output).sub(CHECKPOINTS)
    restarts, reached = 0, committed(places)[:1]
    while True:
        with tempfile.TemporaryDirectory() as unused, _restored_interrupt():  # checkpoints are ours
            trainer = TorchTrainer(
                _on_worker,
                train_loop_config=job,
                scaling_config=ScalingConfig(
                    num_workers=runtime.workers,
                    use_gpu=gpu,
                    resources_per_worker={"CPU": runtime.cpus, **({"GPU": 1} if gpu else {})},
                ),
                run_config=RunConfig(
                    name="ttmray",
                    storage_path=unused,
                    failure_config=FailureConfig(max_failures=0),
                ),
            )
            try:
                trainer.fit()
                return
            except TrainingFailedError as error:
                if (known := user_error(error)) is not None:
                    raise known from error
                reason = str(error).strip().splitlines()[-1]
                before, reached = reached, committed(places)[:1]
                restarts = 1 if reached != before else restarts + 1
                if restarts > runtime.max_restarts:
                    since = f"the checkpoint {reached[0]}" if reached else "the start"
                    raise UserError(
                        f"Workers were lost {restarts} times since {since}; the last time: {reason}",
                        "The same command goes on from there; see runtime.max_restarts. What workers printed last:\n"
                        + (relay.last_words() or "(nothing)"),
                    ) from error
                restart = f"restart {restarts} of at most {runtime.max_restarts} without a new checkpoint"
                console.print(f"a worker was lost ({reason}); {restart}", markup=False)


@contextmanager
def _restored_interrupt() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt inside, too: Ray Train's own handler exits with code 0, as if all were done."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, before)


def user_error(error: BaseException) -> UserError | None:
    """The UserError of a worker inside of Ray's wrappers, if there is one."""
    todo, seen = [error], set()
    while todo:
        node = todo.pop()
        if isinstance(node, UserError):
            return node
        if id(node) in seen:
            continue
        seen.add(id(node))
        inner = [getattr(node, "cause", None), node.__cause__, *getattr(node, "worker_failures", {}).values()]
        todo += [child for child in inner if isinstance(child, BaseException)]
    return None


def _on_worker(settings: dict[str, Any]) -> None:
    """What a Ray Train worker runs."""
    require_usable(settings["gpus"], "cuda", ON_CPUS)  # else Ray Train's device is the CPU

    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    config = settings["class"].model_validate_json(settings["config"])
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(config.runtime.threads or 1)
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    console.file = Marked(sys.stdout)  # type: ignore[assignment]  # the driver prints it, and nothing of libraries
    console.quiet = True  # the driver has made its own task, and said what there is to say
    try:
        task = settings["make_task"](config, device)
    finally:
        console.quiet = False
    if ranks.first:
        cost.carry_on(settings["accounts"])
    train(task, config, ranks, device, settings["device_batch"], settings["force"])
