"""Judges of what a clip sounds like: ridge regressions on encoders' vectors and on how a clip's bands move.

They are for generated clips, about which nobody knows the truth. How often a judge is right about true clips that have
gone the same way, through VAE and vocoder, has to stand beside each of its verdicts, and what it says of a share is to
be corrected by that (`corrected`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ttmray.audio.mel import LogMel, MelConfig
from ttmray.models.scoring import Scorer
from ttmray.pretraining.labels import ridge

_BANDS = LogMel(MelConfig(n_mels=24, fmin=60.0, floor=1e-4))  # 24 bands of 11.6 ms frames


FOLDS = 5


@dataclass(frozen=True)
class Verdicts:
    """Of one question, about clips whose truth nobody knows.

    Attributes:
        yes: (n,) bool.
        right: share of true clips that judges which have not learned from them are right about.
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


def judge(copies: np.ndarray, truth: Sequence[bool], unknown: np.ndarray) -> Verdicts:
    """
    Args:
        copies: (n, D) features of true clips that went the way of the unknown ones, here through VAE and vocoder. The
            judge learns from them; its accuracy is that of `FOLDS` judges about the fold that each of them left out.
        truth: (n) answers about them.
        unknown: (k, D) features of the clips in question.
    """
    answers, fold = np.array(truth), np.arange(len(copies)) % FOLDS
    right = [_yes(copies, answers, copies, fold == one) == answers[fold == one] for one in range(FOLDS)]
    every = np.concatenate([copies, unknown])
    return Verdicts(
        _yes(copies, answers, every, np.arange(len(every)) >= len(copies)), float(np.concatenate(right).mean())
    )


def _yes(copies: np.ndarray, truth: np.ndarray, rows: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(m,) bool of the m rows (n, D) where `asked` (n,) is true, by a judge that knows the others, which are copies."""
    targets = np.zeros((len(rows), 1))
    targets[: len(copies), 0] = truth
    yes: np.ndarray = ridge(rows, targets, asked)[:, 0] > 0.5
    return yes


def corrected(share: float, right: float) -> float:
    """The true share behind the share that a judge says, within [0, 1]; NaN for a judge that only guesses.

    A judge that is right about `right` of the clips, whatever the truth, says p right + (1 - p) (1 - right) of a true
    share p (Rogan and Gladen, American Journal of Epidemiology 1978).
    """
    if right <= 0.5:
        return math.nan
    return float(np.clip((share + right - 1) / (2 * right - 1), 0, 1))
