"""Conditional flow matching on latents, with the condition dropout that classifier-free guidance needs.

"Reverse" convention of MeanAudio: t = 1 is noise, t = 0 is data, x_t = (1 - t) x1 + t x0, velocity x0 - x1.
Every draw is an argument: randomness is keyed to the sample and comes with the batch, so a step depends neither on the
number of workers nor on where a run was interrupted. Sources: Lipman et al. 2023 (flow matching), Esser et al. 2024
(logit-normal t), Ho and Salimans 2022 (condition dropout).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ttmray.config import Config

if TYPE_CHECKING:
    from ttmray.models.backbone import FluxAudio


class FlowMatchingConfig(Config):
    """What the loss depends on. Defaults: the paper's Stage 1."""

    t_mean: float = 0.0
    """Mean of the logit of t."""
    t_scale: float = Field(1.0, gt=0)
    """Standard deviation of the logit of t."""
    text_dropout: float = Field(0.1, ge=0, le=1)
    """Share of samples whose token and pooled text features are both those of the empty text."""
    score_dropout_rate: float = Field(0.1, ge=0, le=1)
    """Share of samples without a score. Models without a score head ignore it."""
    score_dropout: Literal["independent", "joint"] = "independent"
    """Whether the score has a draw of its own, or the text's draw drops both. The paper does not say which."""


class Batch(NamedTuple):
    """B samples and their draws. Floats of any precision; computed in float32."""

    mean: Tensor
    """(B, L, C) mean of the VAE posterior, not normalised."""
    std: Tensor
    """(B, L, C) its standard deviation."""
    text: Tensor
    """(B, T, D) token features."""
    text_c: Tensor
    """(B, 512) pooled text features."""
    posterior_noise: Tensor
    """(B, L, C) standard normal."""
    z: Tensor
    """(B,) standard normal behind t."""
    noise: Tensor
    """(B, L, C) standard normal: x0."""
    u_text: Tensor
    """(B,) uniform on [0, 1) behind text dropout."""
    u_score: Tensor
    """(B,) uniform on [0, 1) behind independent score dropout."""
    score: Tensor | None = None
    """(B,) reward that the model is conditioned on; None for models without a score head."""
    t: Tensor | None = None
    """(B,) times in (0, 1) where something else than `z` decides them (training/guide.py)."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`, copied without waiting where its memory is pinned."""
        moved = {key: value.to(device, non_blocking=True) for key, value in self._asdict().items() if value is not None}
        return Batch(**moved)


def logit_normal_t(z: Tensor, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    """Times in (0, 1) from standard normal draws of any shape: sigmoid(scale z + mean)."""
    return torch.sigmoid(z * scale + mean)


def interpolate(x1: Tensor, x0: Tensor, t: Tensor, reverse: bool = True) -> tuple[Tensor, Tensor]:
    """Point on the straight path between data and noise, and the velocity there.

    Args:
        x1: (B, ...) data.
        x0: (B, ...) noise.
        t: (B,) times.
        reverse: True: t = 1 is noise. False: t = 1 is data (not used by the released models).

    Returns:
        x_t and target, both of the shape of `x1`.
    """
    t = t.reshape(-1, *[1] * (x1.ndim - 1))
    start, end = (x1, x0) if reverse else (x0, x1)
    return (1 - t) * start + t * end, end - start


def sample_losses(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, (B, ...) -> (B,) float32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def drop_text(text: Tensor, text_c: Tensor, empty: Tensor, empty_c: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Token and pooled features with both replaced where `dropped`.

    Args:
        text: (B, T, D).
        text_c: (B, E).
        empty: (T, D) features of the empty text.
        empty_c: (E,) its pooled features.
        dropped: (B,) bool.
    """
    features = text.to(empty.dtype), text_c.to(empty_c.dtype)
    return torch.where(dropped[:, None, None], empty, features[0]), torch.where(dropped[:, None], empty_c, features[1])


def flow_losses(
    model: "FluxAudio", batch: Batch, config: FlowMatchingConfig, forward: Callable[..., Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Flow-matching loss of every sample; the loss of a step is their mean.

    A posterior sample is taken first and normalised after. Nothing random happens here.

    Args:
        model: gives the empty text's features and the normalisation.
        batch: samples and draws on the device of the model.
        config: times and dropout.
        forward: what is called in place of `model`: its DDP or compiled wrapper.

    Returns:
        (B,) losses in float32, with gradients, and (B,) times t.

    Raises:
        ValueError: scores that are not one number per sample.
    """
    x1 = model.normalise(batch.mean.float() + batch.std.float() * batch.posterior_noise.float())
    t = logit_normal_t(batch.z.float(), config.t_mean, config.t_scale) if batch.t is None else batch.t.float()
    x_t, target = interpolate(x1, batch.noise.float(), t)
    dropped = batch.u_text < config.text_dropout
    text, text_c = drop_text(batch.text, batch.text_c, model.empty_string_feat, model.empty_string_feat_c, dropped)
    score, null = batch.score, None
    if score is not None:
        if score.shape != t.shape:
            raise ValueError(f"score has shape {tuple(score.shape)}, not {tuple(t.shape)}")
        u = batch.u_text if config.score_dropout == "joint" else batch.u_score
        score, null = score.float(), u < config.score_dropout_rate
    predicted = (model if forward is None else forward)(x_t, t, text, text_c, score, null)
    return sample_losses(predicted, target), t


def noise_level_sums(t: Tensor, losses: Tensor, bins: int = 10) -> Tensor:
    """(2, bins) float64: sum of losses and number of samples per equal interval of t.

    Stays on the device and adds up over micro-batches and ranks.
    """
    level = (t.detach() * bins).long().clamp(0, bins - 1)
    member = torch.nn.functional.one_hot(level, bins).double()
    return torch.stack([(member * losses.detach().double()[:, None]).sum(0), member.sum(0)])


def noise_level_report(sums: Tensor) -> list[dict[str, float | int | None]]:
    """Rows `from`, `to`, `loss`, `count` per interval of t, of sums (2, bins); `loss` is None without samples."""
    bins = sums.shape[1]
    return [
        {"from": i / bins, "to": (i + 1) / bins, "loss": total / count if count else None, "count": int(count)}
        for i, (total, count) in enumerate(sums.T.tolist())
    ]
