"""Fits the linear models of `ttmray.synth.measures` on pieces with known faults, and tests them on other pieces.

python -m ttmray.synth.calibrate [--pieces 1200] [--seed 777] [--write]
"""

import argparse
import json
import sys
from importlib import resources
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from ttmray.synth.faults import KINDS
from ttmray.synth.measures import estimate, features_of, fitted, measure, onsets, tempo_candidates
from ttmray.synth.world import clip

RIDGE = 3.0


Examples = tuple[np.ndarray, np.ndarray, np.ndarray]


def examples(seed: int, count: int, seconds: float) -> tuple[Examples, list[tuple[np.ndarray, int]]]:
    """Clips of distinct pieces.

    Returns:
        Features (count, features), strengths (count, kinds) and true qualities (count,); and for each clip that is
        played in time and has the true tempo among its candidates, the candidates' features (k, 17) and the number of
        the right one.
    """
    measured, strengths, qualities, tempos = [], [], [], []
    for index in range(count):
        item = clip(seed, index, seconds)
        measured.append(measure(item.mix))
        strengths.append([item.faults.get(kind, 0.0) for kind in KINDS])
        qualities.append(item.quality)
        if item.faults.get("timing", 0.0) < 0.2 and item.faults.get("dropped", 0.0) < 0.3:
            mono = item.mix.mean(axis=0)
            bpm, features = tempo_candidates(onsets(mono / max(1e-5, float(mono.std()))))
            right = np.flatnonzero(np.abs(bpm / item.heard.tempo - 1) < 0.02)
            if right.size:
                tempos.append((features, int(right[0])))
    features = np.array([features_of(one) for one in measured])
    return (features, np.array(strengths), np.array(qualities)), tempos


def fit_tempo(tempos: list[tuple[np.ndarray, int]], rounds: int = 400) -> list[float]:
    """17 weights whose score is highest for the right one of k candidates (k, 17): softmax regression."""
    stacked = np.concatenate([features for features, _ in tempos])
    scale = stacked.std(axis=0) + 1e-6
    weights = np.zeros(scale.size)
    for _ in range(rounds):
        slope = 0.02 * weights
        for features, right in tempos:
            score = features / scale @ weights
            share = np.exp(score - score.max())
            slope = slope + (share / share.sum() @ features - features[right]) / scale / len(tempos)
        weights -= 1.0 * slope
    return np.round(weights / scale, 5).tolist()


def fit(features: np.ndarray, strengths: np.ndarray, qualities: np.ndarray) -> dict[str, list[float]]:
    """Ridge regressions of strengths (n, kinds) and qualities (n,) on features (n, D), as in `measures.json`."""
    mean, scale = features.mean(axis=0), np.maximum(1e-3, features.std(axis=0))
    x = np.clip((features - mean) / scale, -4, 4)
    targets = np.column_stack([strengths, qualities])
    offsets = targets.mean(axis=0)
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (targets - offsets)).T
    offsets = offsets - weights @ x.mean(axis=0)
    models = {"mean": mean, "scale": scale, "strengths": weights[:-1], "offsets": offsets[:-1]}
    models |= {"quality": weights[-1], "quality_offset": offsets[-1]}
    return {name: np.round(values, 5).tolist() for name, values in models.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=1200)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--write", action="store_true", help="replace measures.json by what was fitted")
    arguments = parser.parse_args(argv)
    if arguments.write:
        data, tempos = examples(arguments.seed, arguments.pieces, arguments.seconds)
        content = {"seed": arguments.seed, "pieces": arguments.pieces, "seconds": arguments.seconds}
        target = Path(str(resources.files("ttmray.synth") / "measures.json"))
        target.write_text(json.dumps(content | {"models": fit(*data) | {"tempo": fit_tempo(tempos)}}) + "\n")
        fitted.cache_clear()
    report(arguments.seed + 1, max(20, arguments.pieces // 4), arguments.seconds)
    return 0


def report(seed: int, count: int, seconds: float) -> None:
    """Rank correlations on fresh pieces."""
    true, told, strengths, guessed = [], [], [], []
    for index in range(count):
        item = clip(seed, index, seconds)
        faults, quality = estimate(measure(item.mix))
        true.append(item.quality)
        told.append(quality)
        strengths.append([item.faults.get(kind, 0.0) for kind in KINDS])
        guessed.append([faults[kind] for kind in KINDS])
    print(f"quality: Spearman {spearmanr(true, told).statistic:.3f} on {count} fresh clips of {seconds:g} s")
    for i, kind in enumerate(KINDS):
        rho = spearmanr(np.array(strengths)[:, i], np.array(guessed)[:, i]).statistic
        print(f"  strength of {kind}: {rho:.3f}")


if __name__ == "__main__":
    sys.exit(main())
