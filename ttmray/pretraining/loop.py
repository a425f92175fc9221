"""The loop that all trainers of parts share: seeded, resumable at every checkpoint to the bit, one integer of position.

Update k sees the items k * batch to (k + 1) * batch of an endless stream and draws all its random numbers from (seed,
k), so a run that was killed goes on as if nothing had happened (bit for bit on one CPU thread). AdamW with a linear
warm-up, then half a cosine to a tenth of a percent of the learning rate at the last update; `cycles` of that if told
(warm restarts, Loshchilov and Hutter 2017), so that a part that turns out too weak can go on.
"""

import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ttmray import cost
from ttmray.config import Config, added, execution
from ttmray.console import console
from ttmray.errors import UserError
from ttmray.models import seeded
from ttmray.pretraining.clips import ClipSet
from ttmray.storage import Folder
from ttmray.training.interruption import interrupts
from ttmray.training.logbook import Logbook
from ttmray.training.state import load_optimizer, optimizer_tensors
from ttmray.training.tensors import pack, unpack

CHECKPOINT = "checkpoint.safetensors"


class PartConfig(Config):
    """What every part has. Defaults of the parts are those of the micro bundle."""

    steps: int = Field(1000, ge=1)
    """Optimiser updates; the learning rate's schedule depends on it, so a run of other length is another run."""
    batch: int = Field(8, ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup: int = Field(50, ge=0)
    cycles: int = added(1, ge=1)
    """Equal parts of the updates, in each of which the learning rate rises and falls."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    half: bool = True
    """Write the weights in half precision."""
    budget_s: float | None = execution(None, gt=0)
    """CPU seconds after which the part stops, saved and written as it is; the next start goes on. None: no limit."""
    seed: int = 0
    """Of the first weights and of all draws in training."""


class Part(ABC):
    """A model in training. Built anew at every start, with all its draws from its config's seed.

    Attributes:
        name: its folder in the output.
        model: everything that is trained, buffers of statistics included.
    """

    name: str
    model: nn.Module
    device: torch.device

    @abstractmethod
    def batch(self, position: int, count: int) -> Any:
        """Items [position, position + count) of the stream, from the clips alone and nothing that was before."""

    @abstractmethod
    def loss(self, batch: Any) -> dict[str, Tensor]:
        """`loss` () to descend, and other scalars () for the log, of what `batch` gives."""

    @abstractmethod
    def measure(self, fresh: ClipSet) -> dict[str, float]:
        """Quality on clips of seeds that training never saw."""

    @abstractmethod
    def export(self, out: Folder, half: bool) -> None:
        """Write the files that the loader of `ttmray.models` reads."""

    def after_update(self) -> None:  # noqa: B027 (nothing to do for most)
        """What follows every update."""


@dataclass
class Progress:
    """How far a part is; CPU seconds of all starts together."""

    step: int = 0
    cpu_s: float = 0.0
    loss: float = math.nan


def train(
    part: Part, config: PartConfig, out: Folder, *, checkpoint_every_s: float = 60.0, log_every: int = 20
) -> tuple[Progress, bool]:
    """Train to the last update, the budget or an interruption.

    Args:
        out: folder of the part; an earlier start's checkpoint in it is gone on with.
        checkpoint_every_s: wall seconds between checkpoints.
        log_every: updates between lines of the log.

    Returns:
        How far it is, and whether somebody interrupted it.

    Raises:
        UserError: the loss is not finite, or the checkpoint is damaged or of another model.
    """
    model = part.model.train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, config.lr, betas=config.betas, weight_decay=config.weight_decay)
    progress = _restore(out, model, optimizer)
    saved_at, first, since = time.monotonic(), progress.step, time.monotonic()
    with interrupts() as interrupted, Logbook(out, progress.step, tensorboard=False) as log:
        while progress.step < config.steps and not interrupted() and not _spent(config, progress):
            began = time.process_time()
            step = progress.step
            optimizer.param_groups[0]["lr"] = rate = learning_rate(step, config)
            with reproducible(config.seed, step):
                losses = part.loss(part.batch(step * config.batch, config.batch))
                losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(weights, config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            part.after_update()
            values = {name: float(value.detach()) for name, value in losses.items()}
            if not math.isfinite(values["loss"]):
                raise UserError(
                    f"{part.name}: the loss of update {step + 1} is {values['loss']}.",
                    f"Lower {part.name}.lr ({config.lr:g}) and start again in another output folder.",
                )
            progress.step, progress.loss = step + 1, values["loss"]
            progress.cpu_s += time.process_time() - began
            if progress.step % log_every == 0 or progress.step == config.steps:
                per_s = (progress.step - first) / (time.monotonic() - since)
                row = {"step": progress.step, **values, "lr": rate, "grad_norm": float(norm)}
                row |= {"samples_per_s": per_s * config.batch, "eta_s": (config.steps - progress.step) / per_s}
                log.write(row | {"cpu_s": progress.cpu_s})
                _show(part, config, row)
                cost.note()
            if time.monotonic() - saved_at >= checkpoint_every_s:
                log.flush()
                _save(out, model, optimizer, progress)
                saved_at = time.monotonic()
        log.flush()
        if progress.step > first:
            _save(out, model, optimizer, progress)
        return progress, interrupted()


def learning_rate(step: int, config: PartConfig) -> float:
    """Of the update after `step` updates."""
    length = -(-config.steps // config.cycles)
    step %= length
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    through = (step - config.warmup) / max(1, length - config.warmup)
    return config.lr * (1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * min(1.0, through))))


@contextmanager
def reproducible(seed: int, step: int) -> Iterator[None]:
    """Draws inside, of torch on the CPU, numpy and Python, come from (seed, step); their generators go on after."""
    number = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    python, numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(number)
        np.random.seed(number)
        with seeded(number):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def weights_of(model: nn.Module, half: bool) -> dict[str, Tensor]:
    """State dict in the shapes of the model, on the CPU, contiguous, unshared; with `half`, floats are float16."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    return to_half(state) if half else state


def to_half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floats in half precision; any shapes, other types as they are.

    Raises:
        UserError: a weight is beyond what half precision holds.
    """
    short = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    broken = [name for name, value in short.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UserError(f"weights {broken[0]} do not fit half precision.", "Set half to false for this part.")
    return short


def _spent(config: PartConfig, progress: Progress) -> bool:
    return config.budget_s is not None and progress.cpu_s >= config.budget_s


def _save(out: Folder, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    tensors, layout = optimizer_tensors(optimizer, model)
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():  # tied weights are one tensor under several names
        state[f"model/{name}"] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    state |= {f"optimizer/{name}": value for name, value in tensors.items()}
    out.write(CHECKPOINT, pack(state, {"progress": asdict(progress), "layout": layout}))


def _restore(out: Folder, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    if not out.exists(CHECKPOINT):
        return Progress()
    tensors, about = unpack(out.read(CHECKPOINT), out.path(CHECKPOINT))
    sides: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, value in tensors.items():
        side, _, rest = name.partition("/")
        sides[side][rest] = value
    try:
        model.load_state_dict(sides["model"])
    except RuntimeError as error:
        raise UserError(
            f"{out.path(CHECKPOINT)} is of another model: {error}", "Choose a new output folder."
        ) from error
    load_optimizer(optimizer, model, sides["optimizer"], about["layout"])
    return Progress(**about["progress"])


def _show(part: Part, config: PartConfig, row: dict[str, Any]) -> None:
    numbers = [f"{name} {row[name]:.4g}" for name in row if name not in ("step", "samples_per_s", "eta_s", "cpu_s")]
    speed = f"{row['samples_per_s']:.3g} samples/s | ETA {timedelta(seconds=round(row['eta_s']))}"
    console.print(f"{part.name} {row['step']}/{config.steps} | {' | '.join(numbers)} | {speed}")
