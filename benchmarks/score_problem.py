"""A data set of which one knows what the score does: the coefficient of a clip's latents is its score.

latents = s * direction + noise, at every position: `direction` is one of the channels, of unit RMS. What a trained
model makes of an input score is then one number, the mean coefficient of its samples, and a model that follows its
score has the identity as its curve. Scores are drawn as the paper's rewards are spread (III-D: mean 0.62, sd 0.59).
Model, loss, optimiser and sampler are the real ones, and texts are those of the debug bundle's encoders; only the loop
around the loss is short. For `score_heads.py` and other experiments about scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ttmray.generation.sampler import Draw, Sampler, SamplerConfig
from ttmray.models import seeded
from ttmray.models.backbone import BackboneConfig, FluxAudio
from ttmray.models.clap import Clap, debug_clap
from ttmray.models.score_heads import Head, Null
from ttmray.models.t5 import TextEncoder, debug_text_encoder
from ttmray.training.flow_matching import Batch, FlowMatchingConfig, flow_losses

PROMPTS = ("a calm piano piece", "a fast drum loop", "slow strings", "an energetic rock song")
SCORE_MEAN, SCORE_SD = 0.62, 0.59
"""Of the paper's rewards (III-D)."""


@dataclass(frozen=True)
class ScoreProblem:
    """The data, and texts that say nothing about the score.

    Attributes:
        direction: (C,) float32 of unit RMS.
        noise: standard deviation of a latent around s * direction.
        text: (P, T, D) token features of `PROMPTS`.
        pooled: (P, E) their pooled features.
        empty: token and pooled features of the empty text.
        encoders: for the sampler.
    """

    direction: Tensor
    length: int
    noise: float
    text: Tensor
    pooled: Tensor
    empty: tuple[Tensor, Tensor]
    encoders: tuple[TextEncoder, Clap]

    def scores(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) scores as of a corpus."""
        return SCORE_MEAN + SCORE_SD * torch.randn(count, generator=generator)

    def batch(self, count: int, generator: torch.Generator) -> Batch:
        """Samples and their draws, as the training's loader gives them."""
        shape = (count, self.length, len(self.direction))
        score = self.scores(count, generator)
        prompts = torch.randint(len(self.text), (count,), generator=generator)
        return Batch(
            mean=(score[:, None, None] * self.direction).expand(shape),
            std=torch.full(shape, self.noise),
            text=self.text[prompts],
            text_c=self.pooled[prompts],
            posterior_noise=torch.randn(shape, generator=generator),
            z=torch.randn(count, generator=generator),
            noise=torch.randn(shape, generator=generator),
            u_text=torch.rand(count, generator=generator),
            u_score=torch.rand(count, generator=generator),
            score=score,
        )

    def coefficients(self, latents: Tensor) -> Tensor:
        """(B, N, C) latents, not normalised -> (B,): what stands for the score in them."""
        return (latents * self.direction).mean(dim=(1, 2))


def score_problem(seed: int = 0, length: int = 16, channels: int = 8, noise: float = 0.5) -> ScoreProblem:
    """The problem with its direction drawn by `seed`."""
    text, clap = debug_text_encoder(seed, max_length=9), debug_clap(seed + 1)
    direction = torch.randn(channels, generator=torch.Generator().manual_seed(seed))
    tokens = torch.from_numpy(text.encode([*PROMPTS, ""])).float()
    pooled = torch.from_numpy(clap.embed_text([*PROMPTS, ""])).float()
    direction = direction / direction.square().mean().sqrt()
    return ScoreProblem(
        direction, length, noise, tokens[:-1], pooled[:-1], (tokens[-1], pooled[-1]), encoders=(text, clap)
    )


def new_model(
    problem: ScoreProblem, head: Head, null: Null = "zero_embedding", seed: int = 0, hidden: int = 64, depth: int = 3
) -> FluxAudio:
    """An untrained backbone for the problem, with the latent statistics and the empty text that training would set."""
    config = BackboneConfig(
        latent_dim=len(problem.direction),
        latent_len=problem.length,
        text_dim=problem.text.shape[2],
        text_len=problem.text.shape[1],
        text_c_dim=problem.pooled.shape[1],
        hidden=hidden,
        heads=2,
        depth=depth,
        fused_depth=depth // 2,
        head=head,
        null=null,
    )
    with seeded(seed):
        model = FluxAudio(config)
    with torch.no_grad():
        model.latent_mean.copy_(SCORE_MEAN * problem.direction)
        model.latent_std.copy_((SCORE_SD**2 * problem.direction.square() + problem.noise**2).sqrt())
        model.empty_string_feat.copy_(problem.empty[0])
        model.empty_string_feat_c.copy_(problem.empty[1])
    return model


def train(
    model: FluxAudio,
    problem: ScoreProblem,
    steps: int,
    *,
    batch: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    flow: FlowMatchingConfig | None = None,
) -> list[float]:
    """Updates by the paper's loss and optimiser, with a linear decay over the last half so that curves are at rest.

    Returns:
        The loss of every update.
    """
    flow = flow or FlowMatchingConfig()
    generator = torch.Generator().manual_seed(seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr, (0.9, 0.95), 1e-6, 1e-6, fused=True)
    model.train()
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 50, 2 * (1 - step / steps), 1.0)
        loss = flow_losses(model, problem.batch(batch, generator), flow)[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def curve(
    model: FluxAudio,
    problem: ScoreProblem,
    scores: Sequence[float | None],
    *,
    count: int = 16,
    seed: int = 0,
    settings: Mapping[str, object] | None = None,
) -> dict[float | None, Tensor]:
    """Input score -> (count,) coefficients of samples by the real sampler; None is the null score.

    Args:
        count: samples per score, of the same noises at every score.
        seed: of the noises.
        settings: of `SamplerConfig`; default: 10 Euler steps without guidance, which would amplify.
    """
    sampling = {"steps": 10, "weight": 1.0, "prefix": ""} | dict(settings or {})
    draws = [Draw(str(i), PROMPTS[i % len(PROMPTS)], seed) for i in range(count)]
    by_score: dict[float | None, Tensor] = {}
    for score in scores:
        sampler = Sampler([model], *problem.encoders, SamplerConfig.model_validate(sampling | {"score": score}))
        by_score[score] = problem.coefficients(torch.from_numpy(sampler.sample(draws).latents))
    return by_score
