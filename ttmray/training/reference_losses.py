"""Table of the losses of CRPO's reference, made ahead of training and shared by runs that compare beta or rates.

The draws of a sample follow from its number, so the reference's losses of a run are a table: sample number -> losses of
winner and loser. One run gains nothing but the memory of the second model, for every number is met once; a sweep of n
runs makes (n - 1) fewer passes, a quarter of the work of each.

A folder holds `<key>/losses-<first number>.safetensors`, `ReferenceLosses.PART` samples each; the key is a hash of
everything that decides the losses. Parts that are there are kept.
"""

import torch
from torch import Tensor

from ttmray.errors import UserError
from ttmray.storage import Folder
from ttmray.training.tensors import pack, unpack


class ReferenceLosses:
    """The table of one reference, read part by part.

    Args:
        folder: of all tables.
        key: of this one.
    """

    PART = 1024
    """Samples of a file."""

    def __init__(self, folder: str, key: str) -> None:
        self.folder = Folder.at(folder).sub(key)
        self._parts: dict[int, Tensor] = {}

    def rows(self, numbers: Tensor) -> Tensor:
        """(B, 2) float32 losses of winner and loser of B sample numbers, on the CPU.

        Raises:
            UserError: a part is not there or damaged.
        """
        return torch.stack([self._part(number // self.PART)[number % self.PART] for number in numbers.tolist()])

    def missing(self, samples: int) -> list[int]:
        """Parts of the first `samples` numbers that are not there."""
        there = {entry.name for entry in self.folder.files(sizes=False)}
        return [part for part in range(-(-samples // self.PART)) if self._name(part) not in there]

    def write(self, part: int, losses: Tensor) -> None:
        """Save the losses (B, 2) of winner and loser of the B = `PART` samples of a part."""
        self.folder.write(self._name(part), pack({"losses": losses.float().cpu()}))

    def _part(self, part: int) -> Tensor:
        if part not in self._parts:
            if len(self._parts) > 1:  # numbers come in order; a log line may lie across two
                self._parts.clear()
            path = self.folder.path(self._name(part))
            losses = unpack(self.folder.read(self._name(part)), path)[0].get("losses")
            if losses is None or losses.shape != (self.PART, 2) or not torch.isfinite(losses).all():
                what = f"{path} does not hold {self.PART} pairs of finite losses."
                raise UserError(what, "Delete it: it is made again.")
            self._parts[part] = losses
        return self._parts[part]

    def _name(self, part: int) -> str:
        return f"losses-{part * self.PART:08d}.safetensors"
