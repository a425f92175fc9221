"""Where the scores lie that a model was trained on, and a word to who asks it for another one.

The Fourier features of a score are waves, and nothing is learned about their values beyond the scores of the training
data: there the embedding may resemble that of any score inside. Sampling at s = 5 (paper III-E), far above the largest
reward of the paper's data (+2.76), is such a case. Exported weights therefore carry this, and jobs that sample compare.
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

NUMBERS = ("min", "p5", "p95", "max")


@dataclass(frozen=True, kw_only=True)
class ScoreSupport:
    """Range of the scores that an embedding has seen, in the unit of the rewards.

    Attributes:
        min, p5, p95, max: the widest of the trainings whose scores were made as those of the last one: a later training
            on a few clips makes the embedding not forget the scores of the first, but those of another reward head are
            on another scale.
        trainings: all of the chain that had scores, the oldest first: `column`, `protocol` (of the rewards), `clips`,
            and `mean`, `std`, `min`, `p5`, `p95`, `max` of its scores as drawn.
    """

    min: float
    p5: float
    p95: float
    max: float
    trainings: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, scores: np.ndarray, column: str, protocol: str = "") -> Self:
        """The support of one training.

        Args:
            scores: (n,) with n >= 1, finite, each as often as it is drawn.
            column: name of the reward.
            protocol: how it was made.
        """
        values = scores.astype(np.float64)
        p5, p95 = np.percentile(values, (5, 95))
        numbers = {"min": values.min(), "p5": p5, "p95": p95, "max": values.max()}
        numbers = {name: float(value) for name, value in numbers.items()}
        moments = {"mean": float(values.mean()), "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0}
        facts = {"column": column, "protocol": protocol, "clips": len(values)}
        return cls(**numbers, trainings=(facts | moments | numbers,))

    def after(self, parent: "ScoreSupport | None") -> "ScoreSupport":
        """The support of a training that started from weights with `parent`'s."""
        trainings = (*(parent.trainings if parent else ()), *self.trainings)
        protocol = self.trainings[-1]["protocol"]
        alike = [one for one in trainings if one.get("protocol") == protocol]
        return ScoreSupport(
            min=min(one["min"] for one in alike),
            p5=min(one["p5"] for one in alike),
            p95=max(one["p95"] for one in alike),
            max=max(one["max"] for one in alike),
            trainings=trainings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self) | {"trainings": list(self.trainings)}

    @classmethod
    def from_dict(cls, described: Any) -> Self:
        """What `to_dict` gave.

        Raises:
            ValueError: something else, or numbers that are not finite and in order.
        """
        try:
            numbers = {name: float(described[name]) for name in NUMBERS}
            trainings = tuple(dict(one) for one in described.get("trainings", ()))
            numbered = [float(one[name]) for one in trainings for name in NUMBERS]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no score support: {error!r}") from error
        values = list(numbers.values())
        if not np.isfinite([*values, *numbered]).all() or sorted(values) != values:
            raise ValueError(f"no score support: {numbers}")
        return cls(**numbers, trainings=trainings)

    def text(self) -> str:
        """The numbers, for people."""
        return f"p5 {self.p5:+.2f}, p95 {self.p95:+.2f}, max {self.max:+.2f}"

    def warning(self, score: float | None, what: str) -> str | None:
        """A line about a score beyond p5 to p95; None for one within, and for no score.

        Args:
            score: that is asked for.
            what: names the setting, such as `sampler.score`.
        """
        if score is None or self.p5 <= score <= self.p95:
            return None
        if self.min <= score <= self.max:
            return (
                f"{what} {score:g} is among the outermost 5 % of scores that the model was trained on ({self.text()})."
            )
        beyond = "above" if score > self.max else "below"
        return (
            f"{what} {score:g} is {beyond} all scores that the model was trained on ({self.text()}), where it may do "
            "as for any score inside. ttmray choose-score finds the one at which it is best."
        )

    def grid(self, points: int) -> tuple[float, ...]:
        """Equally far scores from p5 to the largest, rounded to 0.01 but never beyond; fewer where they coincide."""
        scores = np.linspace(self.p5, self.max, points).round(2).clip(self.p5, self.max)
        return tuple(dict.fromkeys(scores.tolist()))
