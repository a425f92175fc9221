"""Synthetic clips for trainers, composed once by worker processes and then read from memory-mapped files.

A set of clips is a seed, a count and a length. Clip i of it is `ttmray.synth.world.clip(seed, i)`, however many there
are, so a larger set goes on with what lies in the folder. Audio is stored as 16-bit integers (-98 dBFS of noise).
"""

import io
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ttmray.console import meter
from ttmray.errors import UserError
from ttmray.json_text import read_json
from ttmray.signals import deaf_children
from ttmray.storage import Folder
from ttmray.synth.captions import caption
from ttmray.synth.faults import true_quality
from ttmray.synth.instruments import RATE
from ttmray.synth.piece import STEMS
from ttmray.synth.world import clip

SHARD = 32
"""Clips per file."""
WORDINGS, UNSEEN = 16, 4
"""Captions per clip, of training and of held-out wordings."""
WORDS = 77
"""Stream of the captions' wordings, beside those of the composer."""


@dataclass(frozen=True)
class Truth:
    """What is true of a clip.

    Attributes:
        captions, unseen: training and held-out wordings.
        attributes: of what is heard in it, flat (`Attributes.row`).
        faults: strengths by kind.
    """

    captions: list[str]
    unseen: list[str]
    attributes: dict[str, Any]
    faults: dict[str, float]
    quality: float


@dataclass(frozen=True)
class ClipSet:
    """`count` clips of a seed; of the first `stems` of them the stems, too. Lies in a local folder.

    Args:
        folder: cache; sets of several seeds and lengths lie side by side.
        seconds: length of a clip, at most 30.
    """

    folder: Folder
    seed: int
    count: int
    seconds: float = 5.0
    stems: int = 0

    def __post_init__(self) -> None:
        if self.folder.remote:
            raise UserError(f"{self.folder}: clips are memory-mapped and need a local folder.", "Name a local path.")
        if not 0 < self.seconds <= 30 or self.count < 1 or self.stems > self.count:
            raise UserError(
                f"clips: seconds {self.seconds:g}, count {self.count}, stems {self.stems} make no set.",
                "Pieces last 30 s at least; stems are of some of the clips.",
            )

    @property
    def samples(self) -> int:
        """Of a clip, at 44.1 kHz."""
        return round(self.seconds * RATE)

    def compose(self, workers: int = 1) -> None:
        """Write what is not there yet, a shard at a time; interrupted, it goes on where it was."""
        shards = range(-(-self.count // SHARD))
        missing = [i for i in shards if not self._complete(i)]
        if not missing:
            return
        with meter(f"composing clips of seed {self.seed}", len(missing) * SHARD) as progress:
            if workers <= 1:
                for shard in missing:
                    _write_shard(self, shard)
                    progress.advance(SHARD)
                return
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                with deaf_children():
                    writing = [pool.submit(_write_shard, self, shard) for shard in missing]
                for done in as_completed(writing):
                    done.result()
                    progress.advance(SHARD)

    def mix(self, index: int) -> np.ndarray:
        """(2, samples) float32 at 44.1 kHz."""
        return _float(_mapped(self._path("mix", index // SHARD))[index % SHARD])

    def mono(self, index: int) -> np.ndarray:
        """(samples,) float32, the mean of both channels."""
        return self.mix(index).mean(axis=0)

    def stem(self, index: int) -> np.ndarray:
        """(4, 2, samples) float32: drums, bass, other, vocals."""
        if index >= self.stems:
            raise IndexError(f"stems are of the first {self.stems} clips, not of clip {index}")
        return _float(_mapped(self._path("stems", index // SHARD))[index % SHARD])

    def truth(self, index: int) -> Truth:
        return _truths(self._path("truth", index // SHARD))[index % SHARD]

    def truths(self) -> list[Truth]:
        return [self.truth(i) for i in range(self.count)]

    def _name(self, kind: str, shard: int) -> str:
        return f"seed{self.seed}-{self.seconds:g}s/{kind}-{shard:05d}.{'json' if kind == 'truth' else 'npy'}"

    def _path(self, kind: str, shard: int) -> str:
        return self.folder.path(self._name(kind, shard))

    def _has_stems(self, shard: int) -> bool:
        return shard * SHARD < self.stems

    def _complete(self, shard: int) -> bool:
        kinds = ("mix", "truth", "stems") if self._has_stems(shard) else ("mix", "truth")
        return all(self.folder.exists(self._name(kind, shard)) for kind in kinds)


def place(seed: int, position: int, count: int) -> int:
    """Which of `count` items is at a position of an endless stream: every epoch has all of them, in its own order."""
    epoch, at = divmod(position, count)
    return int(_order(seed, epoch, count)[at])


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _write_shard(clips: ClipSet, shard: int) -> None:
    mixes, stems, truths = [], [], []
    for index in range(shard * SHARD, (shard + 1) * SHARD):
        item = clip(clips.seed, index, clips.seconds)
        rng = np.random.default_rng([clips.seed, index, WORDS])
        mixes.append(_int16(item.mix))
        if clips._has_stems(shard):
            stems.append(_int16(np.stack([item.stems[name] for name in STEMS])))
        truths.append(
            {
                "captions": [caption(item.heard, rng) for _ in range(WORDINGS)],
                "unseen": [caption(item.heard, rng, heldout=True) for _ in range(UNSEEN)],
                "attributes": item.heard.row(),
                "faults": {kind: float(strength) for kind, strength in item.faults.items()},
            }
        )
    if stems:
        clips.folder.write(clips._name("stems", shard), _npy(stems))
    clips.folder.write(clips._name("mix", shard), _npy(mixes))
    clips.folder.write(clips._name("truth", shard), json.dumps(truths).encode())


def _npy(arrays: Sequence[np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.stack(arrays), allow_pickle=False)
    return buffer.getvalue()


def _int16(audio: np.ndarray) -> np.ndarray:
    return np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16)


def _float(audio: np.ndarray) -> np.ndarray:
    return audio.astype(np.float32) / np.float32(32767)


@lru_cache(maxsize=512)
def _mapped(path: str) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} was not read: {error}", "Delete it; the next start composes it again.") from error
    return array


@lru_cache(maxsize=512)
def _truths(path: str) -> list[Truth]:
    rows = read_json(Path(path).read_bytes())
    # quality follows from the faults, by the costs of today: what older files say of it is left
    return [Truth(**{**row, "quality": true_quality(row["faults"])}) for row in rows]
