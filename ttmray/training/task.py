"""What is trained, as the loop sees it, and which process of how many trains it."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ttmray.models.backbone import FluxAudio
from ttmray.storage import Folder


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

    def batches(self, start: int, batch: int, rank: int, world: int, pin: bool) -> Generator[Any, None, None]:
        """Endless micro-batches from sample `start` on: `Samples` or the like, with `keys` and `to(device)`. Each is
        asked for when it is due, after all updates before it."""

    def losses(self, samples: Any, forward: Callable[..., Tensor]) -> Losses:
        """Losses of a micro-batch on its device; `forward` is the model, perhaps wrapped."""

    def validate(self, device: torch.device, rank: int, world: int) -> tuple[Tensor, Tensor] | None:
        """Losses (n,) and times (n,) of this rank's share of the held-out clips, with the weights as they are."""

    def sample(self, folder: Folder, step: int) -> None:
        """Write audio to listen to (rank 0 only)."""

    def note(self, start: int, stop: int, lines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """What to log about samples start..stop, e.g. how many came from each source.

        Args:
            lines: means of `Losses.extra` over all ranks, of the last log lines, this one last; also after a restart.
        """


@dataclass(frozen=True)
class Ranks:
    """Which process of how many this is."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor of any shape over all ranks, in place."""
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


MakeTask = Callable[[Any, torch.device], Task]
"""Of the config of its own kind."""
