"""The training loop: the same for every stage, on one device or on several, readable top to bottom.

Determinism: a sample's number decides everything random about it (training/data.py), so a run that was killed and
started again goes through the same numbers with the same draws, and on one CPU to the same bits.
"""

import hashlib
import math
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ttmray.config import identity
from ttmray.console import console
from ttmray.errors import UserError
from ttmray.models.backbone import FluxAudio
from ttmray.storage import Folder
from ttmray.training import checkpoint
from ttmray.training.config import TrainConfig
from ttmray.training.data import Samples
from ttmray.training.ema import PowerEMA
from ttmray.training.flow_matching import noise_level_report, noise_level_sums
from ttmray.training.interruption import interrupts, watchdog
from ttmray.training.logbook import Logbook, show
from ttmray.training.memory import peak_flops
from ttmray.training.schedule import learning_rate
from ttmray.training.state import capture, restore, rng_state, set_rng_state

CHECKPOINTS, SNAPSHOTS = "checkpoints", "ema"


@dataclass(frozen=True)
class Losses:
    """What a task makes of a micro-batch: (B,) losses with gradients, (B,) times, (B,) or scalar numbers to log."""

    losses: Tensor
    t: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


class Task(Protocol):
    """What is trained, on what. Everything in it is plain PyTorch."""

    model: FluxAudio
    identity: dict[str, Any]
    """What besides the config must stay the same: data, initial weights, shapes."""
    facts: dict[str, Any]
    """What exported weights say besides, such as the range of the training's scores; decides nothing."""
    flops_per_sample: float
    clips_per_sample: int
    """Clips of a sample whose activations autograd keeps."""
    frozen_models: int
    """Further backbones on the device, without gradients."""

    def batches(self, start: int, batch: int, rank: int, world: int, pin: bool) -> Generator[Samples, None, None]:
        """Endless micro-batches from sample `start` on."""

    def losses(self, samples: Samples, forward: Callable[..., Tensor]) -> Losses:
        """Losses of a micro-batch on its device; `forward` is the model, perhaps wrapped."""

    def validate(self, device: torch.device, rank: int, world: int) -> tuple[Tensor, Tensor] | None:
        """Losses and times of this rank's share of the held-out clips, with the weights as they are."""

    def sample(self, folder: Folder, step: int) -> None:
        """Write audio to listen to (rank 0 only)."""

    def note(self, start: int, stop: int) -> dict[str, Any]:
        """What to log about samples start..stop, e.g. how many came from each source."""


@dataclass(frozen=True)
class Ranks:
    """Which process of how many this is."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value on every rank."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box


class NotFinite(UserError):
    """A loss or gradient was infinite or NaN."""


def trajectory(config: TrainConfig) -> dict[str, Any]:
    """The part of a config that decides the trajectory. More steps at a constant rate only make it longer."""
    kept = identity(config)
    if config.optimizer.schedule == "constant":
        kept.pop("steps")
    return kept


def train(
    task: Task, config: TrainConfig, ranks: Ranks, device: torch.device, device_batch: int, force: bool = False
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
    out = Folder.at(config.output)
    places = out.sub(CHECKPOINTS)
    model = task.model
    optimizer = make_optimizer(model, config)
    ema = PowerEMA(model, config.ema.sigma_rels)
    own = {"config": trajectory(config), **task.identity}
    seed_generators(config.data.seed + ranks.rank)
    step, tally = resume(task, optimizer, ema, places, own, ranks, force)
    if step > config.steps:
        raise UserError(f"{out} has {step} updates already, more than steps: {config.steps}.", "Take another folder.")
    if step == config.steps:
        if ranks.first:
            console.print(f"nothing to do: {out} has all {step} updates", markup=False)
        return
    forward = wrap(model, config, ranks, device)
    accumulation = config.batch // (ranks.world * device_batch)
    log = Tally(task, config, ranks, device, step, tally)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def sample() -> None:
        if ranks.first and config.samples.every and step % config.samples.every == 0:
            with ema.applied(model, config.ema.sigma_rels[0]), preserved_mode(model):
                task.sample(out.sub("samples"), step)

    def save() -> None:
        rng, tallies = ranks.gather(rng_state()), ranks.gather(log.state())
        if not ranks.first:
            return
        saver.save(
            capture(
                model,
                ema,
                optimizer,
                step=step,
                samples=step * config.batch,
                config=config.model_dump(mode="json"),
                identity=own,
                position={"next_sample": step * config.batch, "tally": tallies},
                rng=rng,
                facts=task.facts,
            )
        )

    with (
        interrupts() as interrupted,
        closing(
            task.batches(step * config.batch, device_batch, ranks.rank, ranks.world, device.type == "cuda")
        ) as batches,
        Logbook(out, step, config.runtime.tensorboard, config.runtime.wandb) if ranks.first else nullcontext() as book,
        checkpoint.BackgroundSaver(places, config.checkpoint.keep, config.checkpoint.keep_every) as saver,
        watchdog(config.runtime.watchdog_s) as alive,
    ):
        if step == 0:
            sample()  # noise, but a decoder that is missing is noticed now and not in hours
        while step < config.steps:
            rate = learning_rate(
                step,
                config.optimizer.lr,
                warmup=config.optimizer.warmup,
                total=config.steps,
                schedule=config.optimizer.schedule,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            for part in range(accumulation):
                waited = time.perf_counter()
                samples = next(batches)
                log.wait(time.perf_counter() - waited)
                samples = samples.to(device)
                with nullcontext() if part == accumulation - 1 else unsynchronised(forward):
                    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                        found = task.losses(samples, forward)
                    (found.losses.mean() / accumulation).backward()
                log.add(samples, found)
            norm = nn.utils.clip_grad_norm_(parameters, config.optimizer.clip, foreach=True)
            optimizer.found_inf = log.update_done(step + 1, norm)  # type: ignore[attr-defined]
            optimizer.step()  # does nothing from the first gradient on that is not finite
            optimizer.zero_grad(set_to_none=True)
            ema.update(model)
            step += 1
            alive()
            done = step == config.steps
            if done or look_now(step, config, device):
                log.require_finite(places)  # before anything is written
            if step % config.runtime.log_every == 0 or done:
                values = log.line(step, rate)
                if book is not None:
                    book.write(values)
                    show(values, config.steps, found.extra)
            if config.validation.clips and (step % config.validation.every == 0 or done):
                checked = validation(task, ema, config, ranks, device, step)
                if book is not None and checked:
                    book.write(checked)
                    console.print(
                        f"step {step}: validation loss {checked['validation_loss']:.4f} on {checked['clips']} clips"
                    )
            if (step % config.ema.snapshot_every == 0 or done) and ranks.first:
                ema.write_snapshots(out.sub(SNAPSHOTS), model)
            stop = interrupted()
            if stop:
                log.require_finite(places)
            sample()  # before the checkpoint: a relaunch makes again what comes after it
            if step % config.checkpoint.every == 0 or done or stop:
                if book is not None:
                    book.flush()  # before the checkpoint: lines after it are taken out again, none before it is missing
                save()
            alive()
            if stop and not done:
                console.print(f"interrupted after update {step}, which is saved")
                raise KeyboardInterrupt


def look_now(step: int, config: TrainConfig, device: torch.device) -> bool:
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


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
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


def wrap(model: FluxAudio, config: TrainConfig, ranks: Ranks, device: torch.device) -> Callable[..., Tensor]:
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
    task: Task, ema: PowerEMA, config: TrainConfig, ranks: Ranks, device: torch.device, step: int
) -> dict[str, Any] | None:
    """Mean loss on held-out clips with averaged weights, and by noise level."""
    with ema.applied(task.model, config.ema.sigma_rels[0]), preserved_mode(task.model), torch.inference_mode():
        found = task.validate(device, ranks.rank, ranks.world)
    if found is None:
        return None
    sums = ranks.sum(noise_level_sums(found[1], found[0]))
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


class Tally:
    """Sums between two log lines. Losses stay on the device until a line is due.

    Args:
        step: updates made before this launch.
        state: of the checkpoint that it goes on from, so that the next line is the one of an uninterrupted run.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        ranks: Ranks,
        device: torch.device,
        step: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.task, self.config, self.ranks, self.device = task, config, ranks, device
        self.peak, source = peak_flops(device, config.precision == "bf16")
        if ranks.first:
            console.print(f"peak of this device: {self.peak / 1e12:.3g} TFLOP/s ({source})")
        self.keys = ""
        self.update: list[tuple[list[str], Tensor]] = []
        self.updates: dict[int, list[tuple[list[str], Tensor]]] = {}  # since the host looked last
        self.first_bad = torch.zeros((), dtype=torch.int64, device=device)
        self._reset(step)
        if state is not None:
            self.since, self.keys = state["since"], state["keys"]
            self.levels.copy_(torch.tensor(state["levels"], dtype=torch.float64))
            for name, value in state["extra"].items():
                self.extra[name] = torch.tensor(value, dtype=torch.float64, device=device)

    def _reset(self, step: int) -> None:
        self.since = self.timed_since = step
        self.started, self.waited = time.perf_counter(), 0.0
        self.levels = torch.zeros(2, 10, dtype=torch.float64, device=self.device)
        self.extra: dict[str, Tensor] = {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as plain JSON types."""
        extra = {name: value.tolist() for name, value in self.extra.items()}
        return {"since": self.since, "levels": self.levels.tolist(), "extra": extra, "keys": self.keys}

    def wait(self, seconds: float) -> None:
        self.waited += seconds

    def add(self, samples: Samples, found: Losses) -> None:
        """Count a micro-batch; nothing here waits for the device."""
        self.levels += noise_level_sums(found.t, found.losses)
        for name, value in found.extra.items():
            total = value.detach().double().sum()
            add = torch.stack([total, torch.full_like(total, value.numel())])
            self.extra[name] = self.extra[name] + add if name in self.extra else add
        for key in samples.keys:
            self.keys = hashlib.sha256(f"{self.keys}{key}".encode()).hexdigest()
        self.update.append((samples.keys, found.losses.detach()))

    def update_done(self, number: int, norm: Tensor) -> Tensor:
        """Note the gradient of an update; nothing here waits for the device.

        Gradients are averaged over ranks, so a bad one makes the norm bad everywhere.

        Returns:
            What fused optimisers take as `found_inf`: float32 without dimensions, 1 from the first update on whose
            gradient was not finite, so that neither it nor any later one is applied.
        """
        new = (self.first_bad == 0) & ~torch.isfinite(norm)
        self.first_bad = torch.where(new, number, self.first_bad)
        self.updates[number] = self.update
        self.grad_norm, self.update = norm, []
        return (self.first_bad > 0).float()

    def require_finite(self, checkpoints: Folder) -> None:
        """See that all gradients so far were finite; waits for the device. Every rank must call it.

        Raises:
            NotFinite: one was not; names its update and its worst clips.
        """
        bad = int(self.first_bad)
        if bad:
            raise NotFinite(
                f"The gradient of update {bad} is not finite. Its worst clips: {self.suspects(self.updates[bad])}.",
                f"The newest checkpoint in {checkpoints} stays. Look at these clips, or lower optimizer.lr.",
            )
        self.updates.clear()

    def suspects(self, update: Sequence[tuple[list[str], Tensor]], count: int = 4) -> str:
        """Clips of an update with losses that are not finite, then with the largest; on every rank."""
        own = [pair for keys, losses in update for pair in zip(losses.tolist(), keys, strict=True)]
        pairs = [pair for rank in self.ranks.gather(own) for pair in rank]
        pairs.sort(key=lambda pair: (math.isfinite(pair[0]), -pair[0]))
        return ", ".join(f"{key} (loss {loss:.4g})" for loss, key in pairs[:count])

    def line(self, step: int, rate: float) -> dict[str, Any]:
        """The values of a log line over the updates since the last one; every rank must call it."""
        sums = self.ranks.sum(self.levels)
        total, count = sums.sum(1).tolist()  # waits for the device
        seconds, updates = time.perf_counter() - self.started, step - self.timed_since
        samples = updates * self.config.batch
        flops = samples * self.task.flops_per_sample / seconds / self.ranks.world
        extra = {name: self.ranks.sum(value).tolist() for name, value in self.extra.items()}
        values = {
            "step": step,
            "loss": total / count,
            "lr": rate,
            "grad_norm": float(self.grad_norm),
            **{name: value / number for name, (value, number) in extra.items()},
            "samples": step * self.config.batch,
            "keys_of_rank_0": self.keys[:16],
            **self.task.note(self.since * self.config.batch, step * self.config.batch),
            "loss_levels": noise_level_report(sums),
            "seconds": seconds,
            "samples_per_s": samples / seconds,
            "tflops_per_device": flops / 1e12,
            "mfu": flops / self.peak,
            "data_wait": self.waited / seconds,
            "eta_s": seconds / updates * (self.config.steps - step),
        }
        if self.device.type == "cuda":
            values["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)  # else the decoders of a sample count for ever
        self._reset(step)
        return values
