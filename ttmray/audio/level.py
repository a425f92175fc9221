"""What counts as silence: one rule for the corpus, scores, evaluation and the ranker's features."""

import math

import numpy as np

from ttmray.audio.io import to_mono
from ttmray.errors import ClipError

SILENT_DBFS = -80.0
CANCELLED_DB = -40.0
"""A mono mix this far below its channels (RMS) is what lossy coding leaves where right = -left, and no music."""


def silence(x: np.ndarray, dbfs: float = SILENT_DBFS) -> str:
    """Why there is nothing to hear in a clip; "" where there is.

    CLAP, MERT and the VAE hear the mean of the channels, so a clip is silent, too, where the channels cancel. A
    constant offset is no sound, so levels are taken about the mean.

    Args:
        x: (channels, frames), full scale 1.0.
        dbfs: a sample peak below this is silence.
    """
    level = _db(_peak(x))
    if level < dbfs:
        return f"sample peak {level:.1f} dBFS, under {dbfs:g}"
    if x.shape[0] == 1:
        return ""
    mono = to_mono(x)
    mixed = _db(_peak(mono))
    if mixed < dbfs:
        return f"the channels cancel: sample peak of the mono mix {mixed:.1f} dBFS, under {dbfs:g}"
    difference = _db(math.sqrt(_energy(mono) * x.shape[0] / _energy(x)))
    if difference < CANCELLED_DB:
        return f"the channels cancel: the mono mix is {difference:.1f} dB to them, under {CANCELLED_DB:g}"
    return ""


def require_audible(x: np.ndarray, dbfs: float = SILENT_DBFS) -> None:
    """Refuse a clip (channels, frames) without anything to hear; its scores would mean nothing.

    Raises:
        ClipError: rejected/`silent`.
    """
    why = silence(x, dbfs)
    if why:
        raise ClipError("rejected", "silent", why)


def _peak(x: np.ndarray) -> float:
    return max((_peak_of(row, _offset(row)) for row in np.atleast_2d(x)), default=0.0)


def _peak_of(row: np.ndarray, offset: float) -> float:
    return max(float(row.max(initial=offset)) - offset, offset - float(row.min(initial=offset)))


def _offset(row: np.ndarray) -> float:
    return float(row.mean(dtype=np.float64)) if row.size else 0.0


def _energy(x: np.ndarray) -> float:
    rows = (row - np.float32(_offset(row)) for row in np.atleast_2d(x))
    return sum(float(np.dot(row, row)) for row in rows)


def _db(amplitude: float) -> float:
    return 20 * math.log10(amplitude) if amplitude > 0 else -math.inf
