"""Attributes of clips as numbers: targets of helping losses, and of the linear probes that judge encoders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ttmray.synth.faults import KINDS

FAULT_UNIT = 0.22
"""About the standard deviation of a fault's strength over clips of which five of six do not have it."""
NAMES = ("style", "tempo_word", "kit", "bass", "comp", "lead", "pad", "voice", "room")


@dataclass(frozen=True)
class Labels:
    """One column for every value that an attribute takes somewhere; "" (no such part) is one, too."""

    columns: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, attributes: Sequence[Mapping[str, Any]]) -> "Labels":
        return cls(tuple(sorted({(name, str(row[name])) for row in attributes for name in NAMES})))

    @property
    def size(self) -> int:
        return len(self.columns)

    def row(self, attributes: Mapping[str, Any]) -> np.ndarray:
        """(size,) float32 of zeros and ones."""
        return np.array([str(attributes[name]) == value for name, value in self.columns], np.float32)


def fault_row(faults: Mapping[str, float]) -> np.ndarray:
    """(kinds,) float32, the strengths of all faults in units of about their standard deviation."""
    return np.array([faults.get(kind, 0.0) / FAULT_UNIT for kind in KINDS], np.float32)


def probe(
    features: np.ndarray, truths: Sequence[Mapping[str, Any]], seed: int = 0, per_clip: int = 1
) -> dict[str, float]:
    """What a linear model reads from features (N, D): cross-validated accuracy by attribute, five folds of clips.

    Rows of one clip, `per_clip` after each other, are in one fold.

    Ridge regression on one-hot targets, features scaled to unit deviation. `chance_<name>` is the share of the most
    frequent value.
    """
    folds = np.repeat(np.random.default_rng(seed).permutation(len(features) // per_clip) % 5, per_clip)
    result = {}
    targets = {"drums": [bool(t["kit"]) for t in truths], "vocals": [bool(t["voice"]) for t in truths]}
    targets |= {"tempo_word": [t["tempo_word"] for t in truths], "style": [t["style"] for t in truths]}
    for name, values in targets.items():
        classes, codes = np.unique(np.array(values), return_inverse=True)
        right = [ridge(features, np.eye(len(classes))[codes], folds == fold).argmax(1) == codes[folds == fold]
                 for fold in range(5)]  # fmt: skip
        result[name] = float(np.concatenate(right).mean())
        result[f"chance_{name}"] = float(np.bincount(codes).max() / len(codes))
    return result


def quality_r(features: np.ndarray, quality: Sequence[float], seed: int = 0) -> float:
    """Correlation of true quality with what a cross-validated ridge regression reads from features (N, D)."""
    folds = np.random.default_rng(seed).permutation(len(quality)) % 5
    truth, guess = np.array(quality), np.zeros(len(quality))
    for fold in range(5):
        guess[folds == fold] = ridge(features, truth[:, None], folds == fold)[:, 0]
    return float(np.corrcoef(guess, truth)[0, 1])


def ridge(features: np.ndarray, targets: np.ndarray, test: np.ndarray, penalty: float = 0.1) -> np.ndarray:
    """Predictions (m, K) of a ridge regression from features (n, D) to targets (n, K), for the m rows where `test` (n,)
    is true, fitted on the others; `penalty` is per training row.
    """
    train = features[~test]
    mean, scale = train.mean(axis=0), train.std(axis=0) + 1e-6
    x, y = (train - mean) / scale, targets[~test]
    gram = x.T @ x + penalty * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (y - y.mean(axis=0)))
    predicted: np.ndarray = (features[test] - mean) / scale @ weights + y.mean(axis=0)
    return predicted
