"""Sums between two log lines, and the watch over gradients that are not finite."""

import hashlib
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ttmray.console import console
from ttmray.errors import UserError
from ttmray.models.speed import peak_flops
from ttmray.storage import Folder
from ttmray.training.config import LoopConfig
from ttmray.training.data import Samples
from ttmray.training.flow_matching import noise_level_report, noise_level_sums
from ttmray.training.task import Losses, Ranks, Task

LINES = 16
"""Past log lines that a task may look back upon."""


class NotFinite(UserError):
    """A loss or gradient was infinite or NaN."""


class Tally:
    """Sums between two log lines. Losses stay on the device until a line is due.

    Args:
        step: updates made before this launch.
        state: of the checkpoint that it goes on from, so that the next line is the one of an uninterrupted run.
    """

    def __init__(
        self,
        task: Task,
        config: LoopConfig,
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
        self.lines: deque[dict[str, float]] = deque(maxlen=LINES)
        self.update: list[tuple[list[str], Tensor]] = []
        self.updates: dict[int, list[tuple[list[str], Tensor]]] = {}  # since the host looked last
        self.first_bad = torch.zeros((), dtype=torch.int64, device=device)
        self._reset(step)
        if state is not None:
            self.since, self.keys = state["since"], state["keys"]
            self.lines.extend(state.get("lines", []))
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
        return {"since": self.since, "levels": self.levels.tolist(), "extra": extra, "keys": self.keys} | {
            "lines": list(self.lines)
        }

    def wait(self, seconds: float) -> None:
        self.waited += seconds

    def add(self, samples: Samples, result: Losses) -> None:
        """Count a micro-batch; nothing here waits for the device."""
        self.levels += noise_level_sums(result.t, result.losses)
        for name, value in result.extra.items():
            total = value.detach().double().sum()
            add = torch.stack([total, torch.full_like(total, value.numel())])
            self.extra[name] = self.extra[name] + add if name in self.extra else add
        for key in samples.keys:
            self.keys = hashlib.sha256(f"{self.keys}{key}".encode()).hexdigest()
        self.update.append((samples.keys, result.losses.detach()))

    def update_done(self, number: int, norm: Tensor) -> Tensor:
        """Note the gradient norm () of an update; nothing here waits for the device.

        Gradients are averaged over ranks, so a bad one makes the norm bad everywhere.

        Returns:
            What fused optimisers take as `found_inf`: float32 (), 1 from the first update on whose
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
        """Clips whose losses (B,) are not finite, then those of the largest, in an update; on every rank."""
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
        sums_of_extra = {name: self.ranks.sum(value).tolist() for name, value in self.extra.items()}
        extra = {name: value / number for name, (value, number) in sums_of_extra.items()}
        self.lines.append(extra)
        values = {
            "step": step,
            "loss": total / count,
            "lr": rate,
            "grad_norm": float(self.grad_norm),
            **extra,
            "samples": step * self.config.batch,
            "keys_of_rank_0": self.keys[:16],
            **self.task.note(self.since * self.config.batch, step * self.config.batch, self.lines),
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
