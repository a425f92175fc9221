"""The training loop: the same for every stage, on one device or on several, readable top to bottom.

Determinism: a sample's number decides everything random about it (training/data.py), so a run that was killed and
started again goes through the same numbers with the same draws, and on one CPU to the same bits.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttmray import cost
from ttmray.config import identity
from ttmray.console import console
from ttmray.errors import UserError
from ttmray.inventory import clear
from ttmray.models.backbone import FluxAudio
from ttmray.runs import SUCCESS
from ttmray.storage import Folder
from ttmray.training import checkpoint
from ttmray.training.config import LoopConfig
from ttmray.training.ema import PowerEMA
from ttmray.training.flow_matching import noise_level_report, noise_level_sums
from ttmray.training.interruption import interrupts, watchdog
from ttmray.training.logbook import Logbook, show
from ttmray.training.schedule import learning_rate
from ttmray.training.state import capture, restore, rng_state, set_rng_state
from ttmray.training.tally import Tally
from ttmray.training.task import Losses, Ranks, Task

CHECKPOINTS, SNAPSHOTS = "checkpoints", "ema"


def trajectory(config: LoopConfig) -> dict[str, Any]:
    """The part of a config that decides the trajectory. More steps at a constant rate only make it longer."""
    deciding = identity(config)
    if config.optimizer.schedule == "constant":
        deciding.pop("steps")
    return deciding


def train(
    task: Task, config: LoopConfig, ranks: Ranks, device: torch.device, device_batch: int, force: bool = False
) -> None:
    """Train to `config.steps`, from the newest valid checkpoint of the run folder where there is one.

    Args:
        task: with its model on `device`, equal on every rank.
        device_batch: samples per forward; divides `batch / world`.
        force: go on although the config differs from the checkpoint's.

    Raises:
        UserError: the checkpoint is of another run, or storage fails.
        NotFinite: a gradient that is not finite; the last checkpoint stays.
        KeyboardInterrupt: the run was interrupted; its state is saved.
    """
    run = Training(task, config, ranks, device, device_batch)
    if not run.begin(force):
        return
    pinned = device.type == "cuda"
    first_sample = run.step * config.batch
    with (
        interrupts() as interrupted,
        closing(task.batches(first_sample, device_batch, ranks.rank, ranks.world, pinned)) as batches,
        run.logbook() as book,
        checkpoint.BackgroundSaver(run.places, config.checkpoint.keep, config.checkpoint.keep_every) as saver,
        watchdog(config.runtime.watchdog_s) as alive,
    ):
        if run.step == 0:
            run.sample()  # noise, but a decoder that is missing is noticed now and not in hours
        while run.step < config.steps:
            rate, last = run.update(batches)
            alive()
            done = run.step == config.steps
            if done or look_now(run.step, config, device):
                run.log.require_finite(run.places)  # before anything is written
            if run.step % config.runtime.log_every == 0 or done:
                values = run.log.line(run.step, rate)
                if book is not None:
                    book.write(values)
                    show(values, config.steps, last.extra)
                    cost.note()
            if config.validation.clips and (run.step % config.validation.every == 0 or done):
                run.validate(book)
            if (run.step % config.ema.snapshot_every == 0 or done) and ranks.first:
                run.ema.write_snapshots(run.out.sub(SNAPSHOTS), run.model)
            stop = interrupted()
            if stop:
                run.log.require_finite(run.places)
            run.sample()  # before the checkpoint: a relaunch makes again what comes after it
            if run.step % config.checkpoint.every == 0 or done or stop:
                if book is not None:
                    book.flush()  # before the checkpoint: lines after it are taken out again, none before it is missing
                run.save(saver)
                cost.note()
            alive()
            if stop and not done:
                console.print(f"interrupted after update {run.step}, which is saved")
                raise KeyboardInterrupt


class Training:
    """What a launch of `train` holds, and the single acts of its loop. `step` counts the updates that were made."""

    def __init__(self, task: Task, config: LoopConfig, ranks: Ranks, device: torch.device, device_batch: int) -> None:
        self.task, self.config, self.ranks, self.device = task, config, ranks, device
        self.out = Folder.at(config.output)
        self.places = self.out.sub(CHECKPOINTS)
        self.model = task.model
        self.optimizer = make_optimizer(task.model, config)
        self.ema = PowerEMA(task.model, config.ema.sigma_rels)
        self.identity = {"config": trajectory(config), **task.identity}
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        self.accumulation = config.batch // (ranks.world * device_batch)
        self.step = 0

    def begin(self, force: bool) -> bool:
        """Go to the newest valid checkpoint; whether there is anything left to do.

        Raises:
            UserError: the checkpoint is of another run or has more updates than `config.steps`.
        """
        config, ranks = self.config, self.ranks
        seed_generators(config.draw_seed + ranks.rank)
        self.step, tally = resume(self.task, self.optimizer, self.ema, self.places, self.identity, ranks, force)
        if self.step > config.steps:
            raise UserError(
                f"{self.out} has {self.step} updates already, more than steps: {config.steps}.", "Take another folder."
            )
        if self.step == config.steps:
            if ranks.first:
                console.print(f"nothing to do: {self.out} has all {self.step} updates", markup=False)
            return False
        if ranks.first:
            clear(self.out, SUCCESS)  # of an end whose checkpoint is damaged: from here on the run is not finished
        self.forward = wrap(self.model, config, ranks, self.device)
        self.log = Tally(self.task, config, ranks, self.device, self.step, tally)
        return True

    def logbook(self) -> AbstractContextManager[Logbook | None]:
        """Of the first rank; None on the others."""
        runtime = self.config.runtime
        return Logbook(self.out, self.step, runtime.tensorboard, runtime.wandb) if self.ranks.first else nullcontext()

    def update(self, batches: Iterator[Any]) -> tuple[float, Losses]:
        """One update of weights and averages; its learning rate, and the losses of its last micro-batch."""
        config, o = self.config, self.config.optimizer
        rate = learning_rate(self.step, o.lr, warmup=o.warmup, total=config.steps, schedule=o.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for part in range(self.accumulation):
            waited = time.perf_counter()
            samples = next(batches)
            self.log.wait(time.perf_counter() - waited)
            samples = samples.to(self.device)
            with nullcontext() if part == self.accumulation - 1 else unsynchronised(self.forward):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    result = self.task.losses(samples, self.forward)
                (result.losses.mean() / self.accumulation).backward()
            self.log.add(samples, result)
        norm = nn.utils.clip_grad_norm_(self.parameters, o.clip, foreach=True)
        self.optimizer.found_inf = self.log.update_done(self.step + 1, norm)  # type: ignore[attr-defined]
        self.optimizer.step()  # does nothing from the first gradient on that is not finite
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)
        self.step += 1
        return rate, result

    def validate(self, book: Logbook | None) -> None:
        """Losses of the held-out clips into the log; every rank must call it."""
        checked = validation(self.task, self.ema, self.config, self.ranks, self.device, self.step)
        if book is not None and checked:
            book.write(checked)
            console.print(
                f"step {self.step}: validation loss {checked['validation_loss']:.4f} on {checked['clips']} clips"
            )

    def sample(self) -> None:
        """Audio to listen to, by averaged weights, where it is due after this update."""
        config = self.config
        if self.ranks.first and config.samples.every and self.step % config.samples.every == 0:
            with self.ema.applied(self.model, config.ema.sigma_rels[0]), preserved_mode(self.model):
                self.task.sample(self.out.sub("samples"), self.step)

    def save(self, saver: checkpoint.BackgroundSaver) -> None:
        """A checkpoint of this update; every rank must call it."""
        rng, tallies = self.ranks.gather(rng_state()), self.ranks.gather(self.log.state())
        if not self.ranks.first:
            return
        samples = self.step * self.config.batch
        saver.save(
            capture(
                self.model,
                self.ema,
                self.optimizer,
                step=self.step,
                samples=samples,
                config=self.config.model_dump(mode="json"),
                identity=self.identity,
                position={"next_sample": samples, "tally": tallies},
                rng=rng,
                facts=self.task.facts,
            )
        )


def look_now(step: int, config: LoopConfig, device: torch.device) -> bool:
    """Whether the host looks at what the device has found after this update: it waits for it there.

    On a CPU always, for nothing is to be waited for; else where a log line, validation, averages, audio or a checkpoint
    is due.
    """
    every = (
        config.runtime.log_every,
        config.validation.every if config.validation.clips else 0,
        config.ema.snapshot_every,
        config.samples.every,
        config.checkpoint.every,
    )
    return device.type == "cpu" or any(number and step % number == 0 for number in every)


def make_optimizer(model: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, one group: it can skip an update without the host (`found_inf`)."""
    o = config.optimizer
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, o.lr, o.betas, o.eps, o.weight_decay, fused=True)


def seed_generators(seed: int) -> None:
    """Seed the global generators of this process. Nothing of ours draws from them; an own Task may."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def resume(
    task: Task,
    optimizer: torch.optim.Optimizer,
    ema: PowerEMA,
    places: Folder,
    own: Mapping[str, Any],
    ranks: Ranks,
    force: bool,
) -> tuple[int, dict[str, Any] | None]:
    """Restore the newest valid checkpoint on every rank.

    Returns:
        The updates that were made, and the state of this rank's `Tally` if the number of ranks is the same.
    """
    name = None
    if ranks.first:
        checkpoint.sweep(places)
        name = checkpoint.newest_valid(places)
    name = ranks.share(name)
    if name is None:
        return 0, None
    state = checkpoint.load(places, name)
    checkpoint.refuse_changes(state.identity, own, force)
    restore(state, task.model, ema, optimizer)
    tally = None
    if len(state.rng) == ranks.world:
        set_rng_state(state.rng[ranks.rank])
        tally = state.position["tally"][ranks.rank]
    if ranks.first:
        console.print(f"resuming after update {state.step} ({places.path(name)})", markup=False)
    return state.step, tally


def wrap(model: FluxAudio, config: LoopConfig, ranks: Ranks, device: torch.device) -> Callable[..., Tensor]:
    """What the loss calls: the model, compiled and under DDP where asked for."""
    model.train()
    model.checkpointing = config.runtime.checkpointing
    fast_kernels(device)
    forward: nn.Module = torch.compile(model) if config.runtime.compile else model  # type: ignore[assignment]
    if ranks.world > 1:
        ids = [device.index] if device.type == "cuda" else None
        # every trainable weight gets a gradient in every step, except those of rows that are dropped by chance; buffers
        # are tables that all ranks made alike; gradients live in the buckets, which else hold a second copy of them
        forward = nn.parallel.DistributedDataParallel(
            forward, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    return forward


def fast_kernels(device: torch.device) -> None:
    """On a GPU cuDNN's search, which pays where shapes never change, and TF32 where float32 is left; as in the
    reference trainer."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True


def unsynchronised(forward: Callable[..., Tensor]) -> AbstractContextManager[None]:
    """Under DDP, gradients stay on their rank inside: only the last micro-batch of an update sums them."""
    return forward.no_sync() if isinstance(forward, nn.parallel.DistributedDataParallel) else nullcontext()


def validation(
    task: Task, ema: PowerEMA, config: LoopConfig, ranks: Ranks, device: torch.device, step: int
) -> dict[str, Any] | None:
    """Mean loss on held-out clips with averaged weights, and by noise level."""
    with ema.applied(task.model, config.ema.sigma_rels[0]), preserved_mode(task.model), torch.inference_mode():
        losses_and_times = task.validate(device, ranks.rank, ranks.world)
    if losses_and_times is None:
        return None
    losses, times = losses_and_times
    sums = ranks.sum(noise_level_sums(times, losses))
    total, count = sums.sum(1).tolist()
    return {
        "step": step,
        "validation_loss": total / count,
        "clips": int(count),
        "sigma_rel": config.ema.sigma_rels[0],
        "validation_levels": noise_level_report(sums),
    }


@contextmanager
def preserved_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the former mode after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
