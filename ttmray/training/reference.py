"""Losses of CRPO's reference, computed ahead of training and shared by runs that compare beta, rates or lengths.

The draws of a sample follow from its number, so the reference's losses of a run are a table: sample number -> losses of
winner and loser. One run gains nothing but the memory of the second model, for every number is met once; a sweep of n
runs makes (n - 1) fewer passes, a quarter of the work of each.

A folder holds `<key>/losses-<first number>.safetensors`, `PART` samples each; the key is a hash of everything that
decides the losses. Parts are made on Ray actors or in this process, and those that are there are kept.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttmray.cluster import PoolConfig, each
from ttmray.config import fingerprint
from ttmray.console import meter
from ttmray.errors import UserError
from ttmray.storage import Folder
from ttmray.training.data import loader
from ttmray.training.tensors import pack, unpack

if TYPE_CHECKING:
    from ttmray.training.crpo import CrpoConfig, CrpoTask

PART = 1024
"""Samples of a file."""


class ReferenceLosses:
    """The table of one reference, read part by part.

    Args:
        folder: of all tables.
        key: of this one.
    """

    def __init__(self, folder: str, key: str) -> None:
        self.folder = Folder.at(folder).sub(key)
        self._parts: dict[int, Tensor] = {}

    def rows(self, numbers: Tensor) -> Tensor:
        """(B, 2) float32 losses of winner and loser of B sample numbers, on the CPU.

        Raises:
            UserError: a part is not there or damaged.
        """
        return torch.stack([self._part(number // PART)[number % PART] for number in numbers.tolist()])

    def missing(self, samples: int) -> list[int]:
        """Parts of the first `samples` numbers that are not there."""
        there = {entry.name for entry in self.folder.files(sizes=False)}
        return [part for part in range(-(-samples // PART)) if _name(part) not in there]

    def write(self, part: int, losses: Tensor) -> None:
        self.folder.write(_name(part), pack({"losses": losses.float().cpu()}))

    def _part(self, part: int) -> Tensor:
        if part not in self._parts:
            if len(self._parts) > 1:  # numbers come in order; a log line may lie across two
                self._parts.clear()
            path = self.folder.path(_name(part))
            losses = unpack(self.folder.read(_name(part)), path)[0].get("losses")
            if losses is None or losses.shape != (PART, 2) or not torch.isfinite(losses).all():
                raise UserError(f"{path} does not hold {PART} pairs of finite losses.", "Delete it: it is made again.")
            self._parts[part] = losses
        return self._parts[part]


def _name(part: int) -> str:
    return f"losses-{part * PART:08d}.safetensors"


def reference_key(config: "CrpoConfig", identity: dict[str, Any]) -> str:
    """Of everything that decides the losses of a reference: its weights, the pairs, draws, score and precision."""
    same = {name: identity[name] for name in ("data", "backbone", "init", "frozen")}
    same |= {"flow": config.flow.model_dump(mode="json"), "score": config.score, "precision": config.precision}
    return fingerprint(same)[:16]


def precompute(config: "CrpoConfig", task: "CrpoTask", device_batch: int) -> None:
    """Make the parts of a run that are not there yet.

    Args:
        device_batch: samples per forward. In bf16 it should be that of training, for rounding that policy and reference
            share cancels before beta multiplies it.
    """
    table = task.table
    assert table is not None
    todo = table.missing(config.steps * config.batch)
    runtime = config.runtime
    on_gpu = runtime.runner == "ray" and runtime.device != "cpu" and task.device.type == "cuda"
    pool = PoolConfig(runner=runtime.runner, workers=runtime.workers, cpus=runtime.cpus, gpus=float(on_gpu))
    make = partial(_Maker, config.model_dump_json(), str(task.device), device_batch)
    with meter("reference, pairs", len(todo) * PART) as progress:
        for part, losses in each(make, todo, pool):
            table.write(part, losses)
            progress.advance(PART)


class _Maker:
    """The reference in one process; a call makes a part."""

    def __init__(self, config: str, device: str, batch: int) -> None:
        from ttmray.training.crpo import CrpoConfig, CrpoTask

        self.config = CrpoConfig.model_validate_json(config).model_copy(update={"reference_losses": None})
        self.device, self.batch = torch.device(device), batch
        self.task = CrpoTask(self.config, self.device)

    def __call__(self, part: int) -> tuple[int, Tensor]:
        found: list[Tensor] = []
        batches = loader(self.task.pairs, self.config.data, start=part * PART, batch=self.batch)
        for _, samples in zip(range(-(-PART // self.batch)), batches, strict=False):
            samples = self.task.scored(samples.to(self.device))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                found.append(self.task.reference_losses(samples).float().cpu())
        return part, torch.cat(found)[:PART]
