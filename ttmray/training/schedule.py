"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state."""

from typing import Literal

Schedule = Literal["constant", "step"]


def learning_rate(step: int, base: float, *, warmup: int = 0, total: int = 0, schedule: Schedule = "constant") -> float:
    """Learning rate that the optimiser uses at `step`.

    Linear warm-up (step + 1) / (warmup + 1), then `base`. `step` multiplies it by 0.1 at int(0.8 total) and again at
    int(0.9 total), both counted from the end of the warm-up as in the public MeanAudio trainer.

    Args:
        step: optimiser updates made before this one.
        base: learning rate after the warm-up.
        warmup: updates of warm-up.
        total: updates of the whole run; only `step` uses it.
        schedule: `constant` (the paper's text) or `step` (the public config).
    """
    if step < warmup:
        return base * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return base
    drops = sum(step - warmup >= int(share * total) for share in (0.8, 0.9))
    return base * 0.1**drops
