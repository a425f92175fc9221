"""From noise to latents: the flow's differential equation, solved with classifier-free guidance (paper III-E).

A sample depends on its prompt, its seed and the settings, never on the batch, the order or the worker that makes it:
its noise is keyed by (seed, prompt id, candidate), and on a CPU the backbone sees one clip at a time in one torch
thread (see `ttmray.models.micro_batch`). GPUs take batches of clips, which can change last bits.

Unlike the released script: noise does not come from a CUDA generator seeded by the row of the prompt (two seeds that
are close share most of their noise there, and a changed order changes every clip), and the branches of guidance are one
forward.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ttmray.config import Config
from ttmray.errors import UserError
from ttmray.generation.stochastic import Steps
from ttmray.models import require_finite, side_by_side, to_float32
from ttmray.models.backbone import Conditions, FluxAudio

if TYPE_CHECKING:
    from ttmray.models.clap import Clap
    from ttmray.models.t5 import TextEncoder

PREFIX = "high quality instrumental music, "
NEGATIVE_PROMPT = "noise, distortion, low quality, static, hum, hiss, clipping, muffled, amateur recording"
SCORE_LIMIT = 100.0
"""Rewards of the paper lie within +-3, its sampling score is 5; a score beyond this is a mistake."""
FEATURES_KEPT = 256
"""Texts whose features are kept in memory: 80 MB with the paper's encoders."""

Score = float | None
Part = TypeVar("Part")


class SamplerConfig(Config):
    """How latents are drawn. Defaults are the paper's submission (III-E)."""

    solver: Literal["euler", "heun"] = "euler"
    """`heun` is second order: two evaluations per step, but one in the last."""
    steps: int = Field(25, ge=1, le=1000)
    """Steps from t = 1 to t = 0, equally long."""
    min_sigma: float = Field(0.0, ge=0, lt=1)
    """The grid ends at 0 - min_sigma (a setting of the reference; the paper has 0)."""
    prefix: str = PREFIX
    """Put before every prompt."""
    negative_prompt: str = NEGATIVE_PROMPT
    """What guidance leads away from; empty: the features of the empty text that the checkpoint holds."""
    score: Score = Field(5.0, ge=-SCORE_LIMIT, le=SCORE_LIMIT)
    """Score to generate for, in the unit of the rewards of the training; null: none, as for a backbone without head."""
    guidance: Literal["joint", "two_axis"] = "joint"
    """`joint` is Eq. 2: one weight for text and score. `two_axis` has a weight for each:
    v = v(0,0) + text_weight [v(c,0) - v(0,0)] + score_weight [v(c,s) - v(c,0)]. Equal weights give Eq. 2."""
    weight: float = Field(4.0, ge=0, le=100)
    """w of Eq. 2. Where all weights of a step are 1, only v(c, s) is computed."""
    text_weight: float = Field(4.0, ge=0, le=100)
    """Of `two_axis`."""
    score_weight: float = Field(4.0, ge=0, le=100)
    """Of `two_axis`."""
    schedule: Literal["constant", "anneal", "interval"] = "constant"
    """How weights change with the progress p = step / steps: `anneal` goes linearly from the weight towards
    `low_weight`, `interval` has the weight for p in `interval` and `low_weight` outside."""
    low_weight: float = Field(1.0, ge=0, le=100)
    """Other end of the schedules."""
    interval: tuple[float, float] = (0.2, 0.8)
    """First and last progress with full weight."""
    mode: Literal["single", "crossover", "crossover_reverse", "average"] = "single"
    """With a second checkpoint: `crossover` starts with the second and ends with the first, `crossover_reverse` the
    other way round, `average` mixes their velocities in every step."""
    second_score: Score | Literal["same"] = "same"
    """Score for the second checkpoint."""
    handoff: float = Field(0.5, ge=0, le=1)
    """Share of the steps before a crossover."""
    first_share: float = Field(0.5, ge=0, le=1)
    """Share of the first checkpoint in the average."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the backbone under autocast; the state of the solver stays in float32."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError("interval needs 0 <= first <= last <= 1")
        if isinstance(self.second_score, float) and abs(self.second_score) > SCORE_LIMIT:
            raise ValueError(f"second_score must lie within +-{SCORE_LIMIT:g}")
        if self.guidance == "two_axis" and (self.score is None or self.scores[-1] is None):
            raise ValueError("guidance two_axis needs a score; use joint for none")
        return self

    @property
    def scores(self) -> tuple[Score, ...]:
        """The score for each checkpoint."""
        if self.mode == "single":
            return (self.score,)
        return (self.score, self.score if self.second_score == "same" else self.second_score)

    def weights(self, step: int) -> tuple[float, ...]:
        """Guidance weights of a step: (w,), or (text, score)."""
        p = step / self.steps
        high = (self.weight,) if self.guidance == "joint" else (self.text_weight, self.score_weight)
        if self.schedule == "anneal":
            return tuple(w + (self.low_weight - w) * p for w in high)
        if self.schedule == "interval" and not self.interval[0] <= p <= self.interval[1]:
            return (self.low_weight,) * len(high)
        return high

    def shares(self, step: int) -> tuple[tuple[int, float], ...]:
        """(index, share) of the checkpoints whose velocities are mixed in a step."""
        if self.mode == "single":
            return ((0, 1.0),)
        if self.mode == "average":
            return ((0, self.first_share), (1, 1 - self.first_share))
        early = step < round(self.handoff * self.steps)
        return ((int(early == (self.mode == "crossover")), 1.0),)


@dataclass(frozen=True)
class Draw:
    """One sample to draw: what it depends on besides weights and settings. `prompt` is without the prefix."""

    prompt_id: str
    prompt: str
    seed: int
    candidate: int = 0


@dataclass(frozen=True)
class Sampled:
    """Latents (n, N, C) float32: `normalised` as the backbone sees them, `latents` as the VAE does."""

    normalised: np.ndarray
    latents: np.ndarray


Velocity = Callable[[Tensor, Tensor, int], Tensor]
"""(x, t, step) -> dx/dt; t has no dimensions, `step` counts from 0 and stays the same within a step."""


def time_grid(steps: int, min_sigma: float = 0.0) -> Tensor:
    """(steps + 1,) float32 on the CPU, from 1 (noise) to 0 - min_sigma (data)."""
    return torch.linspace(1, 0 - min_sigma, steps + 1)


def integrate(velocity: Velocity, x: Tensor, grid: Tensor, solver: str = "euler") -> Tensor:
    """Follow `velocity` from x at grid[0] to grid[-1], in either direction.

    Euler takes the velocity at the start of a step. Heun averages it with that at the Euler step's end, the last step
    excepted, whose end is t = 0. No step waits for the device.

    Args:
        grid: (steps + 1,) times, on the CPU.
    """
    times = grid.to(x.device)
    lengths = grid.diff().tolist()
    for step, dt in enumerate(lengths):
        v = velocity(x, times[step], step)
        if solver == "heun" and step < len(lengths) - 1:
            v = (v + velocity(x + dt * v, times[step + 1], step)) / 2
        x = x + dt * v
    return x


def noise(seed: int, prompt_id: str, shape: tuple[int, ...], candidate: int = 0) -> Tensor:
    """Standard normal float32 noise of any shape on the CPU that depends on its arguments alone.

    Drawn by numpy's Philox generator, whose key is a SHA-256. torch's generator is not used, because its vectorised
    Box-Muller transform has other last bits on other CPUs. numpy's depends on the system's `log1p` alone, in the tails
    of the distribution (1 value in 3,700): another C library may change a last bit there.
    """
    key = hashlib.sha256(json.dumps(["noise", seed, prompt_id, candidate]).encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


@dataclass(frozen=True)
class Branches:
    """What guidance evaluates, one block of B rows after another in one forward.

    Order: (text, score), (negative text, null score) and, for two axes, (text, null score).
    """

    conditions: Conditions
    score: Tensor | None
    null: Tensor | None

    def first(self, rows: int) -> "Branches":
        return Branches(
            self.conditions[:rows],
            None if self.score is None else self.score[:rows],
            None if self.null is None else self.null[:rows],
        )


def make_branches(
    backbone: FluxAudio, text: Conditions, negative: Conditions, score: Score, two_axis: bool = False
) -> Branches:
    """Rows of all branches.

    Args:
        text: of B clips.
        negative: of one text, or of B.
        score: for all clips; None for none.

    Raises:
        ValueError: a score for a backbone without a head.
    """
    batch = len(text.pooled)
    away = Conditions(negative.tokens.expand(batch, -1, -1), negative.pooled.expand(batch, -1, -1))
    conditions = Conditions.cat([text, away, text] if two_axis else [text, away])
    if backbone.score_embed is None:
        if score is not None:
            raise ValueError("this backbone has no score head, so it takes no score")
        return Branches(conditions, None, None)
    rows, device = len(conditions.pooled), conditions.pooled.device
    scores = torch.zeros(rows, device=device)
    null = torch.ones(rows, dtype=torch.bool, device=device)
    if score is not None:
        scores[:batch] = score
        null[:batch] = False
    return Branches(conditions, scores, null)


def branch_count(weights: tuple[float, ...]) -> int:
    """Rows of a forward per clip under these weights of guidance."""
    return 1 if all(w == 1 for w in weights) else 1 + len(weights)


def guided(
    velocity: Callable[..., Tensor], x: Tensor, t: Tensor, branches: Branches, weights: tuple[float, ...]
) -> Tensor:
    """Velocity with guidance: all branches in one forward, or only the first where all weights are 1.

    Args:
        velocity: of the backbone.
        x: (B, N, C).
        t: no dimensions, or (B,).
        weights: (w,) of Eq. 2, or (text, score); see `SamplerConfig.guidance`.
    """
    count = branch_count(weights)
    rows, times = branches.first(count * len(x)), t.expand(len(x)).repeat(count)
    v = velocity(x.repeat(count, 1, 1), times, rows.conditions, rows.score, rows.null).float()
    if count == 1:
        return v
    if count == 2:
        full, null = v.chunk(2)
        return null + weights[0] * (full - null)
    full, null, text = v.chunk(3)
    return null + weights[0] * (text - null) + weights[1] * (full - text)


class Sampler:
    """Draws latents for prompts.

    A process on a CPU should be limited to one torch thread (`ttmray.models.one_thread`).

    Args:
        backbones: the checkpoint, or two for the modes that mix them; on one device.
        text: encoder of token features.
        pooled: CLAP that gives pooled text features (role clap_condition).
        config: the settings.
        batch: most clips per forward on a GPU.
        threads: clips side by side on a CPU.
        compile: compile the backbone (minutes at the first batch; last bits change).

    Raises:
        UserError: backbones that do not fit the encoders, the settings or each other.
    """

    def __init__(
        self,
        backbones: Sequence[FluxAudio],
        text: "TextEncoder",
        pooled: "Clap",
        config: SamplerConfig,
        *,
        batch: int = 16,
        threads: int = 1,
        compile: bool = False,
    ) -> None:
        _check_fit(backbones, text, pooled, config)
        self.config = config
        self.device = backbones[0].latent_mean.device
        self.shape = (backbones[0].latent_len, backbones[0].config.latent_dim)
        """(N, C) of a sample."""
        self._backbones = list(backbones)
        self._velocities = [torch.compile(b.velocity) if compile else b.velocity for b in backbones]
        self._text, self._pooled = text, pooled
        self._batch, self._threads = (1, threads) if self.device.type == "cpu" else (batch, 1)
        self._grid = time_grid(config.steps, config.min_sigma)
        self._features: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._negatives: list[Conditions] = []

    @torch.inference_mode()
    def sample(self, draws: Sequence[Draw]) -> Sampled:
        """Latents of draws, in order. Every distinct text is encoded once.

        Raises:
            RuntimeError: latents that are not finite; names the draws.
        """
        parts = self._in_groups(self._draw, draws)
        normalised = torch.cat([torch.empty(0, *self.shape), *parts])
        latents = self._backbones[0].unnormalise(normalised.to(self.device))
        shape = (len(draws), *self.shape)
        result = Sampled(to_float32(normalised, shape, "sampler"), to_float32(latents, shape, "sampler"))
        require_finite(result.latents, "latents")
        return result

    @torch.inference_mode()
    def paths(self, draws: Sequence[Draw], steps: Steps) -> tuple[np.ndarray, np.ndarray]:
        """Whole paths of drawn steps, and the log-probabilities of what was drawn.

        States are rounded to float16 as soon as they are drawn: what is stored is what was drawn, and a later pass with
        the same weights finds the same probabilities. The first state is the noise that `sample` starts from.

        Returns:
            (n, steps + 1, N, C) float16 of normalised states, and (n, steps) float32.

        Raises:
            RuntimeError: states or probabilities that are not finite in float16; names the draws.
        """
        parts = self._in_groups(lambda group: self._path(group, steps), draws)
        count = len(steps.keep)
        states = np.concatenate([np.empty((0, count + 1, *self.shape), np.float16), *(one for one, _ in parts)])
        log_probs = np.concatenate([np.empty((0, count), np.float32), *(one for _, one in parts)])
        require_finite(states, "states as float16")
        require_finite(log_probs, "log-probabilities")
        return states, log_probs

    @torch.inference_mode()
    def step_means(self, draws: Sequence[Draw], states: np.ndarray, steps: Steps) -> np.ndarray:
        """Means of all steps after states (n, steps + 1, N, C) of paths, by these weights: (n, steps, N, C) float16."""
        shape = (len(steps.keep), *self.shape)
        rows = {id(draw): i for i, draw in enumerate(draws)}

        def work(group: Sequence[Draw]) -> np.ndarray:
            velocity = self._guided(group)
            own = torch.from_numpy(states[[rows[id(draw)] for draw in group]]).to(self.device).float()
            return np.stack(
                [
                    steps.mean(own[:, i], velocity(own[:, i], self._grid[i].to(self.device), i), _all(i, own)).cpu()
                    for i in range(len(steps.keep))
                ],
                axis=1,
            ).astype(np.float16)

        return np.concatenate([np.empty((0, *shape), np.float16), *self._in_groups(work, draws)])

    @torch.inference_mode()
    def unnormalise(self, states: np.ndarray) -> np.ndarray:
        """Normalised states (n, N, C) as the VAE sees them, float32."""
        latents = self._backbones[0].unnormalise(torch.from_numpy(states).to(self.device).float())
        return to_float32(latents, states.shape, "latents")

    @torch.inference_mode()
    def text_features(self, draws: Sequence[Draw]) -> tuple[np.ndarray, np.ndarray]:
        """Token and pooled features of the draws' texts and, last, of the negative text: (n + 1, T, D), (n + 1, E)."""
        texts = [self.config.prefix + draw.prompt for draw in draws]
        negative = self.config.negative_prompt
        self._encode([*texts, negative] if negative else texts)
        pairs = [self._features[text] for text in texts]
        if negative:
            pairs.append(self._features[negative])
        else:
            backbone = self._backbones[0]
            pairs.append((backbone.empty_string_feat.cpu().numpy(), backbone.empty_string_feat_c.cpu().numpy()))
        return np.stack([tokens for tokens, _ in pairs]), np.stack([pooled for _, pooled in pairs])

    def _in_groups(self, work: Callable[[Sequence[Draw]], Part], draws: Sequence[Draw]) -> list[Part]:
        """What `work` makes of groups of draws, in order. Every distinct text is encoded once."""
        self._encode([self.config.prefix + draw.prompt for draw in draws])
        if not self._negatives:
            self._negatives = [self._negative(backbone) for backbone in self._backbones]
        groups = [draws[i : i + self._batch] for i in range(0, len(draws), self._batch)]
        return side_by_side(work, groups, self._threads)

    def _draw(self, draws: Sequence[Draw]) -> Tensor:
        starts = [noise(draw.seed, draw.prompt_id, self.shape, draw.candidate) for draw in draws]
        return integrate(self._guided(draws), torch.stack(starts).to(self.device), self._grid, self.config.solver).cpu()

    def _path(self, draws: Sequence[Draw], steps: Steps) -> tuple[np.ndarray, np.ndarray]:
        velocity, count = self._guided(draws), len(steps.keep)
        shape = (count + 1, *self.shape)
        drawn = torch.stack([noise(draw.seed, draw.prompt_id, shape, draw.candidate) for draw in draws])
        drawn = drawn.to(self.device)
        states, log_probs = [drawn[:, 0].half()], []
        for i, spread in enumerate(steps.spread.tolist()):
            x = states[-1].float()
            mean = steps.mean(x, velocity(x, self._grid[i].to(self.device), i), _all(i, x))
            states.append((mean + spread * drawn[:, i + 1]).half())
            log_probs.append(steps.log_prob(states[-1], mean, _all(i, x)))
        return torch.stack(states, 1).cpu().numpy(), torch.stack(log_probs, 1).cpu().numpy()

    def _guided(self, draws: Sequence[Draw]) -> Velocity:
        """The velocity of draws under guidance."""
        config = self.config
        with self._autocast():
            branches = [
                make_branches(
                    backbone, self._conditions(backbone, draws), negative, score, config.guidance == "two_axis"
                )
                for backbone, negative, score in zip(self._backbones, self._negatives, config.scores, strict=True)
            ]

        def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
            weights = config.weights(step)
            total = torch.zeros_like(x)
            with self._autocast():
                for index, share in config.shares(step):
                    total += share * guided(self._velocities[index], x, t, branches[index], weights)
            return total

        return velocity

    def _autocast(self) -> AbstractContextManager[None]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _encode(self, texts: Sequence[str]) -> None:
        """Make sure that the features of the texts are at hand."""
        if len(self._features) > FEATURES_KEPT:
            self._features.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._features]
        if new:
            pairs = zip(self._text.encode(new), self._pooled.embed_text(new), strict=True)
            self._features.update(zip(new, pairs, strict=True))

    def _conditions(self, backbone: FluxAudio, draws: Sequence[Draw]) -> Conditions:
        pairs = [self._features[self.config.prefix + draw.prompt] for draw in draws]
        tokens = torch.from_numpy(np.stack([pair[0] for pair in pairs])).to(self.device)
        pooled = torch.from_numpy(np.stack([pair[1] for pair in pairs])).to(self.device)
        return backbone.conditions(tokens, pooled)

    def _negative(self, backbone: FluxAudio) -> Conditions:
        text = self.config.negative_prompt
        if not text:
            with self._autocast():
                return backbone.empty_conditions(1)
        # encoded as prompts are, without autocast
        tokens = torch.from_numpy(self._text.encode([text])).to(self.device)
        pooled = torch.from_numpy(self._pooled.embed_text([text])).to(self.device)
        with self._autocast():
            return backbone.conditions(tokens, pooled)


def _all(step: int, rows: Tensor) -> Tensor:
    return torch.full((len(rows),), step, device=rows.device)


def _check_fit(backbones: Sequence[FluxAudio], text: "TextEncoder", pooled: "Clap", config: SamplerConfig) -> None:
    if len(backbones) != len(config.scores):
        raise UserError(
            f"sampler.mode is {config.mode}, which takes {len(config.scores)} checkpoints; there are {len(backbones)}.",
            "Set sampler.mode (crossover, crossover_reverse, average) together with second_checkpoint.",
        )
    names = ("checkpoint", "second_checkpoint")
    for name, score_name, backbone, score in zip(
        names, ("score", "second_score"), backbones, config.scores, strict=False
    ):
        shape = backbone.config
        needed = (shape.text_len, shape.text_dim, shape.text_c_dim)
        offered = (text.max_length, text.dim, pooled.dim)
        if needed != offered:
            raise UserError(
                f"{name}: the backbone takes {needed[0]} x {needed[1]} token and {needed[2]} pooled text features, "
                f"the bundle's encoders give {offered[0]} x {offered[1]} and {offered[2]}.",
                "Name the bundle that it was trained with.",
            )
        if score is not None and shape.head == "none":
            raise UserError(
                f"sampler.{score_name} is {score:g}, but the backbone of {name} has no score head.",
                f"Set sampler.{score_name}=null, or name a checkpoint with a head.",
            )
    first = backbones[0]
    for other in backbones[1:]:
        if (first.latent_len, first.config.latent_dim) != (other.latent_len, other.config.latent_dim) or not (
            torch.equal(first.latent_mean, other.latent_mean) and torch.equal(first.latent_std, other.latent_std)
        ):
            raise UserError(
                "checkpoint and second_checkpoint have other latents: their sizes or statistics differ.",
                "Mix checkpoints of one training chain.",
            )
