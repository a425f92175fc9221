"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state."""

from collections.abc import Sequence
from typing import Literal

Schedule = Literal["constant", "step"]


def learning_rate(
    step: int,
    base: float,
    *,
    warmup: int = 0,
    total: int = 0,
    schedule: Schedule = "constant",
    milestones: Sequence[float] = (0.8, 0.9),
    gamma: float = 0.1,
) -> float:
    """Learning rate that the optimiser uses at `step`.

    Linear warm-up (step + 1) / (warmup + 1), then `base`. `step` multiplies it by `gamma` at int(m total) for each
    milestone m, counted from the end of the warm-up; the defaults are the public MeanAudio trainer's.

    Args:
        step: optimiser updates made before this one.
        base: learning rate after the warm-up.
        warmup: updates of warm-up.
        total: updates of the whole run; only `step` uses it.
        schedule: `constant` (the paper's text) or `step` (the public config).
        milestones: shares of `total`; only `step` uses them.
        gamma: factor of each drop.
    """
    if step < warmup:
        return base * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return base
    drops = sum(step - warmup >= int(share * total) for share in milestones)
    return base * gamma**drops
