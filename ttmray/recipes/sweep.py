"""What the curves of Figure 2 say: how the reward follows the score, and what a flat curve is due to.

The paper reads the flat curve of its submission as saturation: training has absorbed the score (IV-C). But the
submission also runs weights of v1 in the v2 forward, where the score may steer nothing whatever the training did.
Curves of the same weights in both forwards tell the two apart.
"""

from collections.abc import Mapping

import numpy as np

from ttmray.recipes.ablation_tables import Cell, against
from ttmray.statistics import Paired, pearson, spearman


def sweep_notes(curves: Mapping[str, Mapping[float, Cell]], trained: tuple[float, float]) -> tuple[str, ...]:
    """How s and the mean reward go together, over all of s and over the range of the training rewards."""
    notes = []
    for name, cells in curves.items():
        everywhere = [(score, cell.mean("reward")) for score, cell in cells.items()]
        points = [(score, reward) for score, reward in everywhere if reward is not None]
        inside = [(score, reward) for score, reward in points if trained[0] <= score <= trained[1]]
        for what, some in ((f"s in [{trained[0]:g}, {trained[1]:g}]", inside), ("all s", points)):
            if len(some) < 3:
                continue
            s, rewards = (np.array(column) for column in zip(*some, strict=True))
            r = pearson(s, rewards)
            rho = spearman(s, rewards).rho if np.ptp(rewards) > 0 else None
            shown = [
                f"{what_r} {value:+.2f}"
                for what_r, value in (("Pearson r", r), ("Spearman ρ", rho))
                if value is not None
            ]
            notes.append(
                f"{name}, {what}: reward {rewards.min():+.3f} to {rewards.max():+.3f} "
                f"({', '.join(shown) or 'constant'}; {len(some)} points)."
            )
    return tuple(notes)


def readings(
    curves: Mapping[str, Mapping[float, Cell]], crossed: Mapping[str, str], trained: tuple[float, float]
) -> tuple[str, ...]:
    """One sentence for every curve of a cross-load: whether the score was lost by it, or before it.

    A score steers where the mean reward at the upper end of `trained` is above that at the lower end, with its 95 %
    interval over prompts (paired); it is lost where the interval ends below half of what the own forward has.

    Args:
        crossed: curve in another forward -> curve of the same weights in their own.
        trained: range of the training rewards.
    """
    sentences = []
    for other, own in crossed.items():
        if own not in curves or other not in curves:
            continue
        before, after = _steering(curves[own], trained), _steering(curves[other], trained)
        if before is None or after is None:
            continue
        numbers = f"{own} {_shown(before)}, {other} {_shown(after)}"
        if before.low <= 0:
            verdict = "no steering is shown before the cross-load either: saturated, never learned, or too few prompts"
        elif after.low > 0:
            verdict = f"the cross-load keeps {after.difference / before.difference:.0%} of the steering"
        elif after.high < before.difference / 2:
            verdict = "the cross-load loses the score, which training has not saturated"
        else:
            verdict = "too few prompts to tell what the cross-load keeps"
        sentences.append(
            f"Reward at s = {trained[1]:g} minus that at {trained[0]:g}, same weights: {numbers}. Reading: {verdict}."
        )
    return tuple(sentences)


def _steering(curve: Mapping[float, Cell], trained: tuple[float, float]) -> Paired | None:
    if not set(trained) <= curve.keys():
        return None
    return against(curve[trained[1]], curve[trained[0]], "reward")


def _shown(test: Paired) -> str:
    return f"{test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}]"
