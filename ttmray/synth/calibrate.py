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
from ttmray.synth.measures import estimate, features_of, measure
from ttmray.synth.world import clip

RIDGE = 3.0


def examples(seed: int, count: int, seconds: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (count, features), strengths (count, kinds) and true qualities (count,) of clips of distinct pieces."""
    features, strengths, qualities = [], [], []
    for index in range(count):
        item = clip(seed, index, seconds)
        features.append(features_of(measure(item.mix)))
        strengths.append([item.faults.get(kind, 0.0) for kind in KINDS])
        qualities.append(item.quality)
    return np.array(features), np.array(strengths), np.array(qualities)


def fit(features: np.ndarray, strengths: np.ndarray, qualities: np.ndarray) -> dict[str, list[float]]:
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
    x = np.clip((features - mean) / scale, -4, 4)
    targets = np.column_stack([strengths, qualities])
    offsets = targets.mean(axis=0)
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (targets - offsets)).T
    offsets = offsets - weights @ x.mean(axis=0)
    models = {"mean": mean, "scale": scale, "strengths": weights[:-1], "offsets": offsets[:-1]}
    models |= {"quality": weights[-1], "quality_offset": offsets[-1]}
    return {name: np.round(values, 5).tolist() for name, values in models.items()}


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=1200)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--write", action="store_true", help="replace measures.json by what was fitted")
    arguments = parser.parse_args(given)
    if arguments.write:
        data = examples(arguments.seed, arguments.pieces, arguments.seconds)
        content = {"seed": arguments.seed, "pieces": arguments.pieces, "seconds": arguments.seconds}
        target = Path(str(resources.files("ttmray.synth") / "measures.json"))
        target.write_text(json.dumps(content | {"models": fit(*data)}) + "\n")
    report(arguments.seed + 1, max(20, arguments.pieces // 4), arguments.seconds)
    return 0


def report(seed: int, count: int, seconds: float) -> None:
    """Rank correlations on fresh pieces."""
    true, told, strengths, guessed = [], [], [], []
    for index in range(count):
        item = clip(seed, index, seconds)
        found, quality = estimate(measure(item.mix))
        true.append(item.quality)
        told.append(quality)
        strengths.append([item.faults.get(kind, 0.0) for kind in KINDS])
        guessed.append([found[kind] for kind in KINDS])
    print(f"quality: Spearman {spearmanr(true, told).statistic:.3f} on {count} fresh clips of {seconds:g} s")
    for i, kind in enumerate(KINDS):
        rho = spearmanr(np.array(strengths)[:, i], np.array(guessed)[:, i]).statistic
        print(f"  strength of {kind}: {rho:.3f}")


if __name__ == "__main__":
    sys.exit(main())
