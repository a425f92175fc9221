"""Steps of the flow that draw their next state: Gaussian, so that what was drawn has a probability (online GRPO).

Time is that of the sampler: t = 1 is noise, t = 0 data, the grid falls, x_t = (1 - t) data + t noise, v = noise - data.
Two kinds of step:

- `sde`, the flow's differential equation with noise (Flow-GRPO, Liu et al. 2025). With exact v and small steps its
  marginals are those of the deterministic flow; with few steps its states are noisier than their time says.
  std = noise_level sqrt(t / (1 - t)), at t = 1 with the first t' in the root's place of t,
  mean = x (1 + std^2 dt / (2 t)) + v (1 + std^2 (1 - t) / (2 t)) dt, x' = mean + std sqrt(-dt) eps.
- `cps` (coefficients-preserving sampling): parts of data and of noise in a state are those of its time, also with few
  steps; where v leaves data uncertain, states spread less than the flow's.
  std = t' sin(noise_level pi / 2), mean = (1 - t') (x - t v) + sqrt(t'^2 - std^2) (x + (1 - t) v), x' = mean + std eps.

Both means are linear in x and v, so a grid is a table of coefficients (`Steps`), made in float64. The rest is float32:
under bfloat16 the probabilities of two passes would not be equal.
"""

import itertools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["sde", "cps"]


class Steps(NamedTuple):
    """Coefficients of all steps of a grid, (steps,) float32 each: x' = keep x + move v + spread eps."""

    kind: Kind
    keep: Tensor
    move: Tensor
    spread: Tensor
    """Standard deviation of what is drawn; 0 in the last step of `cps`."""
    std: Tensor
    """That of the KL: as `spread`, but for `sde` without sqrt(-dt), as in the public trainer."""

    def mean(self, x: Tensor, v: Tensor, step: Tensor) -> Tensor:
        """Mean (B, N, C) of the next state after x (B, N, C) with velocity v (B, N, C), in steps (B,)."""
        keep, move = (table.to(x.device)[step][:, None, None] for table in (self.keep, self.move))
        return keep * x.float() + move * v.float()

    def log_prob(self, after: Tensor, mean: Tensor, step: Tensor) -> Tensor:
        """(B,) log-density of next states (B, N, C), averaged over frames and channels: clip ranges mean the same for
        clips of every length. Of `cps` -(x' - mean)^2 alone: constants and the division by the variance are left
        out, which is 0 at the end."""
        squares = (after.float() - mean).square()
        if self.kind == "cps":
            return -squares.flatten(1).mean(1)
        spread = self.spread.to(mean.device)[step]
        return -squares.flatten(1).mean(1) / (2 * spread**2) - spread.log() - 0.5 * math.log(2 * math.pi)


def make_steps(grid: Tensor, kind: Kind, noise_level: float) -> Steps:
    """The steps of a falling grid (steps + 1,) of times from 1 to 0.

    Raises:
        ValueError: a grid that does not fall from 1 to 0.
    """
    times = [float(t) for t in grid]
    if times[0] != 1 or times[-1] != 0 or any(b >= a for a, b in itertools.pairwise(times)):
        raise ValueError(f"times must fall from 1 to 0, not {times}")
    rows = [_step(t, after, times[1], kind, noise_level) for t, after in itertools.pairwise(times)]
    keep, move, spread, std = (torch.tensor(column, dtype=torch.float32) for column in zip(*rows, strict=True))
    return Steps(kind, keep, move, spread, std)


def _step(t: float, after: float, first: float, kind: Kind, noise_level: float) -> tuple[float, float, float, float]:
    """keep, move, spread and std from t to the time after it."""
    if kind == "cps":
        std = after * math.sin(noise_level * math.pi / 2)
        noise = math.sqrt(max(0.0, after**2 - std**2))
        return 1 - after + noise, noise * (1 - t) - (1 - after) * t, std, std
    dt = after - t
    std = noise_level * math.sqrt(t / (1 - (first if t == 1 else t)))
    return 1 + std**2 / (2 * t) * dt, (1 + std**2 * (1 - t) / (2 * t)) * dt, std * math.sqrt(-dt), std
