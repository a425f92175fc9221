"""How good a ranker is: accuracy with intervals, calibration, paired tests, and the report of a run. Pure numpy."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

from ttmray import pages, statistics

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error and its bins.

    Attributes:
        ece: mean |confidence - accuracy| over the bins, weighted by their pairs.
        counts, confidence, accuracy: per bin, from the smallest margins to the largest.
    """

    ece: float
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def decided(target: np.ndarray) -> np.ndarray:
    """(P,) bool: pairs that are no tie."""
    return target != 0.5


def correct(margin: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(P,) bool: a is predicted where the margin is positive; a margin of exactly 0 predicts b, as in the release."""
    return (margin > 0) == (target > 0.5)


def calibration(margin: np.ndarray, right: np.ndarray, bins: int = BINS) -> Calibration:
    """ECE over bins of equal count, the last one with the remainder, of pairs that are no tie.

    Confidence is sigmoid(|margin|), so it starts at 0.5.

    Args:
        margin: (P,) s(a) - s(b), divided by a temperature if there is one.
        right: (P,) bool.

    Raises:
        ValueError: fewer pairs than bins.
    """
    if len(margin) < bins:
        raise ValueError(f"{len(margin)} pairs do not fill {bins} bins")
    order = np.argsort(np.abs(margin), kind="stable")
    ends = [*(i * (len(order) // bins) for i in range(1, bins)), len(order)]
    groups = np.split(order, ends[:-1])
    confidence = np.array([expit(np.abs(margin[group])).mean() for group in groups])
    accuracy = np.array([right[group].mean() for group in groups])
    counts = np.array([len(group) for group in groups])
    ece = float(counts @ np.abs(confidence - accuracy) / len(order))
    return Calibration(ece, counts, confidence, accuracy)


def fit_temperature(margin: np.ndarray, target: np.ndarray) -> float:
    """T that minimises the cross-entropy of sigmoid(margin / T), both (P,), ties included; in [0.01, 100], 1 without
    margins.
    """
    if not np.any(margin):
        return 1.0

    def loss(log_t: float) -> float:
        logit = margin * math.exp(-log_t)
        return float(np.mean(np.logaddexp(0, logit) - target * logit))

    bound = math.log(100)
    optimum = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    return math.exp(optimum.x)


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """(chi2, p) of McNemar's test of two rankers on the same pairs ((P,) bool, see `correct`)."""
    return statistics.mcnemar(int((first & ~second).sum()), int((~first & second).sum()))


def metrics(
    margin: np.ndarray,
    target: np.ndarray,
    sources: Sequence[str],
    temperature: float = 1.0,
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Everything about one ranker on P pairs, as plain JSON types; ties count in `pairs` only.

    Args:
        margin: (P,) logits.
        target: (P,) in {0, 0.5, 1}, 1 where a was preferred.
        sources, groups: name of each pair's source, and of the group that intervals draw it with.
    """
    keep = decided(target)
    margin, target = margin[keep], target[keep]
    names = np.asarray(sources, object)[keep]
    grouped = None if groups is None else np.asarray(groups, object)[keep].astype(str)
    right = correct(margin, target)

    def part(which: np.ndarray) -> dict[str, Any]:
        some = right[which]
        inside = None if grouped is None else grouped[which].tolist()
        return {
            "decided": len(some),
            "accuracy": float(some.mean()) if len(some) else None,
            "interval": list(statistics.grouped_interval(some, inside)) if len(some) else None,
        }

    result = {"pairs": len(keep), **part(np.ones(len(right), bool))}
    result["mean_abs_margin"] = float(np.abs(margin).mean()) if len(margin) else None
    if len(margin) >= BINS:
        result["ece"] = calibration(margin, right).ece
        result["ece_with_temperature"] = calibration(margin / temperature, right).ece
    result["sources"] = {name: part(names == name) for name in sorted(set(names.tolist()))}
    return result


def reliability_png(parts: dict[str, Calibration]) -> bytes | None:
    """Accuracy over confidence per bin, one line per name; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
    for name, part in parts.items():
        axes.plot(part.confidence, part.accuracy, marker="o", label=f"{name}, ECE {part.ece:.3f}")
    axes.set(xlabel="confidence, sigmoid(|margin|)", ylabel="accuracy", xlim=(0.5, 1), ylim=(0, 1.02))
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


FEW_PAIRS = 100
"""With fewer decided pairs an accuracy of 0.6 is not told from chance."""
EXTREME_TEMPERATURE = 10.0
"""Beyond it, or below its inverse, margins and votes have nothing to do with each other's size."""


def grave_warnings(result: dict[str, Any]) -> list[str]:
    """What a reader must know first; one line for all heads that it is said of.

    Args:
        result: what `metrics.json` holds.
    """
    warnings = []
    if str(result["run"]["split"]).startswith("pair:"):
        warnings.append(
            "the split is by pair: clips of test pairs are in training pairs, too, and accuracies are too good "
            "(split.by item, prompt or system holds them out)."
        )
    about: dict[str, list[str]] = {}
    for name, head in result["heads"].items():
        test, temperature = head["test"], head.get("temperature", 1.0)
        if not head["note"]:
            if test["decided"] < FEW_PAIRS:
                about.setdefault(
                    f"{test['decided']} decided test pairs are too few to tell how good it is.", []
                ).append(name)
            if test["interval"] is not None and test["interval"][0] <= 0.5:
                about.setdefault("no better than chance on the test pairs, as far as they can tell.", []).append(name)
        if head["best_epoch"] == 0:
            about.setdefault("no epoch after the first was better: it has hardly learned.", []).append(name)
        if not 1 / EXTREME_TEMPERATURE <= temperature <= EXTREME_TEMPERATURE:
            text = f"a temperature of {temperature:.3g}: its margins say nothing about how sure it is."
            about.setdefault(text, []).append(name)
    return warnings + [f"{', '.join(names)}: {text}" for text, names in about.items()]


def summary(result: dict[str, Any]) -> str:
    """The report of a run as Markdown; `result` is what `metrics.json` holds."""
    more = {"shown": _shown, "span": _span, "warnings": grave_warnings(result)}
    return pages.render("ranker.md.j2", **{"note": "", **result}, **more)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _span(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
