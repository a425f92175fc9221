"""Clips of a corpus as a torch dataset."""

from typing import Any

import torch
from torch.utils.data import Dataset

from ttmray.training.clips import Clips


class ClipDataset(Dataset[dict[str, Any]]):
    """Items of a corpus by position, in the order of the index.

    An item has the key of its clip, `mean` and `std` of the posterior (frames, channels) and `text` (tokens, width) in
    float16, and in float32 `text_c` (512,), `score` (), NaN without a score column, and `weight` (), of its loss.
    """

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __repr__(self) -> str:
        return f"ClipDataset({len(self)} clips)"

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{i} of {len(self)} clips")
        i %= len(self)
        arrays = zip(("mean", "std", "text", "text_c"), self.clips.arrays(i), strict=True)
        item: dict[str, Any] = {"key": self.clips.key(i)} | {name: torch.from_numpy(array) for name, array in arrays}
        item |= {name: torch.tensor(getattr(self.clips, name)[i]) for name in ("score", "weight")}
        return item

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        self.clips.fetch(places)
        return [self[i] for i in places]
