"""What a number of the index decides besides conditioning: at which times a clip is trained, how much its loss weighs.

Score-aware training (arXiv 2606.07387) sends clips of low scores to high noise, where a model learns what music is like
as a whole, and not to low noise, where it learns how they sound. Next to conditioning on the score, either can be
compared: "condition on the score" with "schedule by the score". All off by default.
"""

from typing import Self

import numpy as np
from pydantic import Field, model_validator

from ttmray.config import Config
from ttmray.corpus.scores import COLUMN
from ttmray.generation.filter import reward_weights

EDGE = 1e-4
"""Times stay so far from 0 and 1."""


class BetaTimes(Config):
    """t of a clip is Beta distributed; its mean goes linearly with the clip's place among all, from worst to best."""

    worst: float = Field(0.75, gt=0, lt=1)
    """Mean of t for the clip of the lowest number; t = 1 is noise."""
    best: float = Field(0.5, gt=0, lt=1)
    """For the one of the highest."""
    concentration: float = Field(4.0, gt=0)
    """a + b of Beta(a, b): higher is narrower. 4 at a mean of 0.5 is Beta(2, 2), close to the logit-normal (0, 1)."""


class GuideConfig(Config):
    """A column, and what it decides."""

    column: str = Field("clap_score", pattern=COLUMN)
    """A number of the index, or `<table>/<column>` of a table of `ttmray corpus rescore`; all sources must have it."""
    times: BetaTimes | None = None
    """Times by the clip's place; null: as in `flow`, the same for all."""
    temperature: float | None = Field(None, gt=0)
    """Weights of losses, exp(z / temperature) of the standardised number z, scaled to a mean of 1; null: none."""
    max_weight: float = Field(20.0, gt=1)
    """Largest weight before they are scaled."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.times is None and self.temperature is None:
            raise ValueError("needs times or temperature: else it decides nothing")
        return self


def beta_time(z: np.ndarray, level: np.ndarray, times: BetaTimes) -> np.ndarray:
    """(n,) float32 times from standard normal draws z (n,): the quantile of z in the Beta of the level (n,) in [0, 1].

    So a draw of the loader decides t here as it does elsewhere, and larger draws are larger times.
    """
    from scipy.special import betaincinv, ndtr  # here, for configs are read without it

    mean = times.worst + (times.best - times.worst) * np.asarray(level, np.float64)
    t = betaincinv(times.concentration * mean, times.concentration * (1 - mean), ndtr(np.asarray(z, np.float64)))
    return np.clip(t, EDGE, 1 - EDGE).astype(np.float32)


def levels(values: np.ndarray) -> np.ndarray:
    """(n,) float32 in (0, 1): the share of all that are lower, ties in the middle of their places."""
    ordered = np.sort(values)
    places = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return (places / (2 * len(values))).astype(np.float32)


def guide_weights(values: np.ndarray, config: GuideConfig) -> np.ndarray:
    """(n,) float32 of mean 1; 1 where the config asks for no weights or all values are the same."""
    deviation = float(np.std(values))
    if config.temperature is None or not deviation:
        return np.ones(len(values), np.float32)
    z = (np.asarray(values, np.float64) - float(np.mean(values))) / deviation
    return reward_weights(z, config.temperature, config.max_weight).astype(np.float32)
