"""How near a copy of music is to the original: log-mel, pitch and tempo."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ttmray.audio.mel import LogMel, MelConfig
from ttmray.pretraining.losses import heard
from ttmray.synth.measures import measure, pitch

DB_PER_NEPER = 20 / math.log(10)


def mel_errors(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Mean absolute errors of two natural-log mels (B, n_mels, frames).

    Returns:
        `mel_db`, over all elements; `mel_heard_db`, of what is above the floor of the losses; `mel_of_silence`, the
        first as a share of the error that silence makes.
    """
    error = float((ours - theirs).abs().mean())
    above = float((heard(ours) - heard(theirs)).abs().mean())
    silence = float((theirs - math.log(MelConfig().floor)).abs().mean())
    return {
        "mel_db": error * DB_PER_NEPER,
        "mel_heard_db": above * DB_PER_NEPER,
        "mel_of_silence": error / max(silence, 1e-6),
    }


def pitch_error(ours: np.ndarray, theirs: np.ndarray, clarity: float = 0.85) -> float:
    """Median distance in semitones where the original (samples,) at 44.1 kHz is clearly pitched; NaN if nowhere."""
    hertz, clear = pitch(theirs)
    other, _ = pitch(ours[: len(theirs)])
    length = min(len(hertz), len(other))
    voiced = (clear[:length] > clarity) & (hertz[:length] > 0)
    if voiced.sum() < 8:
        return math.nan
    distance = np.abs(12 * np.log2(np.maximum(other[:length][voiced], 1.0) / hertz[:length][voiced]))
    return float(np.median(distance))


def compare_waves(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Errors of the log-mel, and of the tempo, of two mono waves (samples,) at 44.1 kHz: `tempo` as it is measured in
    the original, `tempo_off` as a share of it, NaN where there is none.

    The shorter one's length is compared.
    """
    length = min(len(ours), len(theirs))
    mel = LogMel()
    a, b = (mel(torch.from_numpy(np.ascontiguousarray(wave[:length]))[None]) for wave in (ours, theirs))
    before, after = measure(theirs[None, :length]).tempo, measure(ours[None, :length]).tempo
    off = math.nan if before == 0 else abs(after / before - 1)
    return mel_errors(a, b) | {"tempo": before, "tempo_off": off}


def mean_of(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means by name over the rows; what is NaN in a row does not count."""
    names = rows[0].keys()
    means = {}
    for name in names:
        values = [row[name] for row in rows if not math.isnan(row[name])]
        means[name] = float(np.mean(values)) if values else math.nan
    return means
