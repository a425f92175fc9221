"""Training of the separator.

Full size: Hybrid Transformer Demucs (Rouard et al. 2023): 48 channels, five transformer layers, L1 of the stems' waves,
Adam at 3e-4, batch 32, stems remixed within a batch, random gains, swapped channels and signs (Demucs' `augment`). Here
the same at few channels, with the stems remixed across the stream. For the full size set `channels: 48`, `layers: 5`,
`heads: 8`.
"""

import math
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from demucs.htdemucs import HTDemucs
from pydantic import Field
from torch import Tensor

from ttmray.config import added
from ttmray.models import seeded
from ttmray.models.separator import Separator, save_separator
from ttmray.pretraining.clips import ClipSet, place
from ttmray.pretraining.fidelity import mean_of
from ttmray.pretraining.loop import Part, PartConfig, reproducible, to_half, weights_of
from ttmray.storage import Folder
from ttmray.synth.instruments import RATE
from ttmray.synth.piece import STEMS

AUDIBLE, SILENT = 0.02, 1e-6
"""Mean squares of vocals that count: 17 dB below the other stems, and -60 dBFS."""
TRIES = 16


class SeparatorConfig(PartConfig):
    """The micro separator: 0.4 M parameters, about 0.84 CPU seconds per 5 s of stereo."""

    steps: int = Field(2500, ge=1)
    batch: int = Field(4, ge=1)
    lr: float = Field(2e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = Field(5.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    channels: int = Field(8, ge=4)
    depth: int = Field(4, ge=2)
    layers: int = Field(1, ge=1)
    """Of the transformer."""
    heads: int = Field(4, ge=1)
    four: bool = False
    """Drums, bass, other and vocals; otherwise vocals and all others together, which is what removing vocals needs."""
    segment_s: float = Field(3.0, gt=0.5)
    """Seconds of an item, and of the windows in use later."""
    remix: float = Field(0.5, ge=0, le=1)
    """Share of the items whose vocals come from another clip."""
    singing: float | None = added(None, ge=0, le=1)
    """Share of the items in which somebody sings; all others are without vocals. None: as it happens, in less than half
    of them, and then a small model learns for a long time that no vocals are the best guess."""


class SeparatorPart(Part):
    """Random parts of clips whose stems lie in the cache; about half of them sing."""

    name = "separator"

    def __init__(self, config: SeparatorConfig, clips: ClipSet, device: torch.device) -> None:
        self.config, self.clips, self.device = config, clips, device
        sources = list(STEMS) if config.four else ["other", "vocals"]
        with reproducible(config.seed, 0), seeded(config.seed):
            model = HTDemucs(
                sources,
                channels=config.channels,
                depth=config.depth,
                dconv_comp=4,
                t_layers=config.layers,
                t_heads=config.heads,
                segment=Fraction(config.segment_s).limit_denominator(1000),
            )
        self.model: HTDemucs = model.to(device)

    def batch(self, position: int, count: int) -> Tensor:
        """(count, sources, 2, samples) stems, scaled as `Separator` scales its input."""
        return torch.from_numpy(np.stack([self._item(i) for i in range(position, position + count)])).to(self.device)

    def _item(self, position: int) -> np.ndarray:
        rng = np.random.default_rng([self.config.seed, position])
        samples = min(int(self.config.segment_s * RATE), self.clips.samples)
        index = place(self.config.seed, position, self.clips.stems)
        stems = self._crop(index, samples, rng)
        if rng.random() < self.config.remix:
            stems[3] = self._crop(int(rng.integers(self.clips.stems)), samples, rng)[3]
        if self.config.singing is not None:
            stems[3] = self._vocals(stems, rng) if rng.random() < self.config.singing else 0
        for stem in stems:
            stem *= np.float32(rng.choice([-1, 1]) * rng.uniform(0.5, 1.25))
            if rng.random() < 0.5:
                stem[:] = stem[::-1].copy()
        if not self.config.four:
            stems = np.stack([stems[:3].sum(axis=0), stems[3]])
        mono = stems.sum(axis=0).mean(axis=0)
        scaled: np.ndarray = (stems - mono.mean() / len(stems)) / (mono.std() + 1e-4)
        return scaled

    def _vocals(self, stems: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(2, samples): those of (4, 2, samples) stems where they are heard, else the first of other clips that are."""
        vocals = stems[3]
        least = max(AUDIBLE * float(np.square(stems[:3].sum(axis=0)).mean()), SILENT)
        for _ in range(TRIES):
            if np.square(vocals).mean() > least:
                break
            vocals = self._crop(int(rng.integers(self.clips.stems)), vocals.shape[1], rng)[3]
        return vocals

    def _crop(self, index: int, samples: int, rng: np.random.Generator) -> np.ndarray:
        stems = self.clips.stem(index)
        start = int(rng.integers(stems.shape[2] - samples + 1))
        return stems[:, :, start : start + samples].copy()

    def loss(self, batch: Tensor) -> dict[str, Tensor]:
        ours = self.model(batch.sum(dim=1))
        by_source = (ours - batch).abs().mean(dim=(0, 2, 3))
        return {"loss": by_source.mean(), "vocals": by_source[-1]}

    def _copy(self) -> HTDemucs:
        arguments, options = cast(Any, self.model)._init_args_kwargs  # demucs records them for this purpose
        model = HTDemucs(*arguments, **options)
        model.load_state_dict(weights_of(self.model, half=False))
        return model

    @torch.no_grad()
    def measure(self, fresh: ClipSet) -> dict[str, float]:
        """dB on clips that sing: SI-SDR of the instrumental, before and after, and by how much vocals fall."""
        separator, rows, silent = Separator(self._copy()), [], []
        for index in range(fresh.stems):
            stems = fresh.stem(index)
            rest, mix = stems[:3].sum(axis=0), stems.sum(axis=0)
            result = separator.separate([mix])[0]
            if np.square(stems[3]).sum() < 1e-4 * np.square(mix).sum():
                silent.append({"instrumental_kept_db": si_sdr(result.instrumental, mix)})
                continue
            before, after = si_sdr(mix, rest), si_sdr(result.instrumental, rest)
            rows.append({"si_sdr_mix": before, "si_sdr": after, "si_sdr_gain": after - before})
        nothing = {"si_sdr_mix": math.nan, "si_sdr": math.nan, "si_sdr_gain": math.nan}
        return mean_of(rows or [nothing]) | mean_of(silent or [{"instrumental_kept_db": math.nan}])

    def export(self, out: Folder, half: bool) -> None:
        """A bag of one model in Demucs' format, as `load_separator` reads it."""
        model = self._copy()
        if half:
            to_half(model.state_dict())  # refuses what does not fit
            model.half()
        with TemporaryDirectory() as folder:
            save_separator(model, folder, "micro")
            for file in sorted(Path(folder).iterdir()):
                out.write(file.name, file.read_bytes())


def si_sdr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, within +-80, of two arrays of one size and any shape (Le Roux
    et al., ICASSP 2019).
    """
    x, y = (np.asarray(a, np.float64).ravel() for a in (ours, theirs))
    x, y = x - x.mean(), y - y.mean()
    target = (x @ y) / max(float(y @ y), 1e-12) * y
    noise = x - target
    return float(np.clip(10 * np.log10((target @ target + 1e-12) / (noise @ noise + 1e-12)), -80, 80))
