"""The losses of online GRPO: advantages within groups of one prompt, the clipped policy loss, the KL to the parent.

As in Flow-GRPO (Liu et al. 2025) and the public FluxAudio trainer of Resonate. Pure functions; the steps that are drawn
and their probabilities are `generation/stochastic.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

MARGIN = 1e-4
"""Added to the deviation that advantages are divided by."""


def group_advantages(
    rewards: np.ndarray, groups: Sequence[str], *, global_std: bool = True, limit: float = 5.0
) -> np.ndarray:
    """(n,) float64: (reward - mean of its group) / (deviation + 1e-4), within +-limit.

    A clip whose advantage is 0 teaches nothing and is to be left out: all of a group in which all rewards are equal.

    Args:
        rewards: (n,).
        groups: the prompt of each.
        global_std: the population deviation of all rewards; else of the group's.
        limit: of the size of an advantage.
    """
    rewards = np.asarray(rewards, np.float64)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    advantages = np.zeros_like(rewards)
    for group in range(len(names)):
        own = rewards[member == group]
        if own.min() < own.max():  # else rounding of the mean would be all there is
            advantages[member == group] = (own - own.mean()) / ((rewards if global_std else own).std() + MARGIN)
    return np.clip(advantages, -limit, limit)


class PolicyLosses(NamedTuple):
    """(B,) each: what is minimised; the clipped policy loss in it; the KL in it; the ratio of the probabilities."""

    total: Tensor
    policy: Tensor
    kl: Tensor
    ratio: Tensor


def policy_losses(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, kl: Tensor, *, clip_range: float, beta: float
) -> PolicyLosses:
    """max(-A ratio, -A clip(ratio, 1 +- clip_range)) + beta KL of every transition.

    Args:
        log_prob: (B,) of what was drawn, by the policy as it is.
        old_log_prob: (B,) by the policy that drew it.
        advantages: (B,).
        kl: (B,) of `step_kl`.
    """
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    policy = (-advantages * ratio).maximum(-advantages * clipped)
    return PolicyLosses(policy + beta * kl if beta else policy, policy, kl, ratio)


def step_kl(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """(B,) KL of two steps with means (B, N, C) and one deviation (B,), averaged over frames and channels.

    Where the deviation is 0, nothing is drawn and there is no KL: 0.
    """
    squares = (mean - reference.float()).square().flatten(1).mean(1)
    drawn = std > 0
    return (squares / (2 * std.where(drawn, std.new_ones(())) ** 2)).where(drawn, squares.new_zeros(()))
