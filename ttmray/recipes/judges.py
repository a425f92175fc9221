"""Judges of what a clip sounds like: ridge regressions on encoders' vectors and on how a clip's bands move.

They are for generated clips, about which nobody knows the truth. How often a judge is right about true clips has to
stand beside each of its verdicts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ttmray.audio.mel import LogMel, MelConfig
from ttmray.models.scoring import Scorer
from ttmray.pretraining.labels import ridge

_BANDS = LogMel(MelConfig(n_mels=24, fmin=60.0, floor=1e-4))  # 24 bands of 11.6 ms frames


@dataclass(frozen=True)
class Verdicts:
    """Of one question, about clips whose truth nobody knows.

    Attributes:
        yes: (n,) bool.
        right: share of true clips, unseen by the judge, that it is right about.
    """

    yes: np.ndarray
    right: float


def features(scorer: Scorer, waves: Sequence[np.ndarray]) -> np.ndarray:
    """(n, D) float64 of mono waves (samples,) at 44.1 kHz: CLAP and MERT vectors, and per band level, spread, rises and
    falls, which say what the vectors of small encoders leave out: drums and pace."""
    embedded = scorer.embed(waves)
    rows = np.stack([_moves(wave) for wave in waves])
    return np.concatenate([embedded.clap, embedded.mert, rows], axis=1).astype(np.float64)


def _moves(wave: np.ndarray) -> np.ndarray:
    """(120,) statistics of 24 bands over time, in natural logarithms of magnitude."""
    with torch.inference_mode():
        bands: np.ndarray = _BANDS(torch.from_numpy(wave[None]).float())[0].numpy()
    steps = np.diff(bands, axis=1)
    rises = np.maximum(steps, 0)
    parts = (
        bands.mean(axis=1),
        bands.std(axis=1),
        rises.mean(axis=1),
        np.percentile(rises, 95, axis=1),
        np.percentile(steps, 1, axis=1),
    )
    return np.concatenate(parts)


def judge(
    known: np.ndarray, truth: Sequence[bool], copies: np.ndarray, copied: Sequence[bool], unknown: np.ndarray
) -> Verdicts:
    """
    Args:
        known: (n, D) features of true clips, from which the judge learns, with their truth.
        copies: (m, D) features of other true clips that went the way of the unknown ones, here through VAE and
            vocoder, with their truth: how often the judge is right about these is its accuracy.
        unknown: (k, D) features of the clips in question.
    """
    rows = np.concatenate([known, copies, unknown])
    targets = np.zeros((len(rows), 1))
    targets[: len(known), 0] = truth
    yes = ridge(rows, targets, np.arange(len(rows)) >= len(known))[:, 0] > 0.5
    return Verdicts(yes[len(copies) :], float((yes[: len(copies)] == np.array(copied)).mean()))
