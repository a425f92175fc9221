"""How far a score moves what a model makes, and how much of that another forward of the same weights keeps.

The paper measures steering as delta_out: the mean reward at s = 1.5 minus that at s = -0.5 (Table I). Behind it stands
a movement of the latents, which needs neither decoders nor a reward model: with the same noise and text,
d = x(high) - x(low). `moved` is its RMS, in deviations of the latents. `kept` is how much of the movement in the
weights' own forward is in it: sum(own . d) / sum(own . own), 1 for the same movement, 0 for one that has nothing to do
with it, however large. So a score that still moves the latents, but at random, has kept nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ttmray.config import Config
from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.generation.sampler import guided, integrate, make_branches, noise, time_grid
from ttmray.models.backbone import FluxAudio
from ttmray.models.backbone_weights import load_backbone, with_head
from ttmray.models.bundle import open_bundle
from ttmray.models.cross_load import cross_load
from ttmray.models.devices import resolve_device
from ttmray.models.loading import LoadOptions
from ttmray.models.score_heads import Head
from ttmray.models.scoring import Scorer

LOST = 0.2
"""Below this share the score counts as lost. On small trained models v4 keeps 1.00 of what v1 weights do and v2 between
-0.17 and -0.04; after a short training in v2 it is 0.29 or more (benchmarks/score_heads.py, two seeds)."""
STILL = 0.01
"""A score that moves the latents by less than this, in their deviations, was inert before."""
SECOND = 44_100
"""Samples that the encoders of the reward need at least; shorter clips are padded with zeros."""


class SteeringConfig(Config):
    """On what steering is measured."""

    prompts: int = Field(4, ge=0)
    """Texts, one noise each; 0: nothing is measured."""
    scores: tuple[float, float] = (-0.5, 1.5)
    """Low and high (paper, Table I)."""
    steps: int = Field(25, ge=1)
    """Euler steps."""
    reward: bool = True
    """Also decode, and measure delta_out in the reward of the bundle."""


@dataclass(frozen=True)
class Steering:
    """What one forward makes of the two scores.

    Attributes:
        latents: (2, P, N, C) float32 at the low and the high score, normalised.
        decodable: the same as the VAE has them.
    """

    latents: Tensor
    decodable: Tensor

    @property
    def movement(self) -> Tensor:
        return self.latents[1] - self.latents[0]

    @property
    def moved(self) -> float:
        return float(self.movement.square().mean().sqrt())

    def kept_of(self, own: "Steering") -> float | None:
        """Share of another forward's movement; None where that has none."""
        if own.moved < STILL:
            return None
        return float((own.movement * self.movement).sum() / own.movement.square().sum())


@torch.inference_mode()
def steer(model: FluxAudio, text: Tensor, pooled: Tensor, config: SteeringConfig) -> Steering:
    """Latents of P texts at both scores without guidance, from noise that depends on the text's number alone.

    Args:
        model: with a score head; its mode is left as it is (there is no dropout).
        text: (P, T, D) token features, as the corpus stores them.
        pooled: (P, E) pooled features.
    """
    device = model.latent_mean.device
    shape = (model.latent_len, model.config.latent_dim)
    start = torch.stack([noise(0, str(i), shape) for i in range(len(text))]).to(device)
    conditions = model.conditions(text.float().to(device), pooled.float().to(device))
    empty = model.empty_conditions(len(text))
    latents = []
    for score in config.scores:
        branches = make_branches(model, conditions, empty, score)

        def velocity(x: Tensor, t: Tensor, step: int, branches: object = branches) -> Tensor:
            return guided(model.velocity, x, t, branches, (1.0,))  # type: ignore[arg-type]

        latents.append(integrate(velocity, start, time_grid(config.steps)))
    decodable = torch.stack([model.unnormalise(x).cpu() for x in latents])
    return Steering(torch.stack([x.cpu() for x in latents]), decodable)


def delta_out(bundle: str, runs: Sequence[Steering], device: str) -> list[dict[str, float]]:
    """Reward of every run's clips by the bundle's decoders and reward model, which sees no text.

    Returns:
        `low` and `high`, means at the two scores; `delta_out`, their difference; `sd` of it over the texts.

    Raises:
        UserError: the bundle's models are not there, or have other latents.
    """
    source = open_bundle(bundle)
    options, channels = LoadOptions(device=device, batch=1), runs[0].latents.shape[-1]
    decoder = source.load({"latents", "vocoder"}, options).latents
    if decoder.channels != channels:
        raise UserError(f"the weights make {channels} latent channels, the VAE of {bundle} has {decoder.channels}.")
    scorer = Scorer(source.load(Scorer.roles, options), source.protocol("empty"))
    rows = []
    for run in runs:
        waves = decoder.to_audio(run.decodable.flatten(0, 1).numpy(), batch=1)
        waves = np.pad(waves, ((0, 0), (0, max(0, SECOND - waves.shape[1]))))
        low, high = scorer.rewards(scorer.embed(waves), scorer.texts([""] * len(waves))).reshape(2, -1)
        change = high - low
        numbers = {"low": low.mean(), "high": high.mean(), "delta_out": change.mean(), "sd": change.std()}
        rows.append({name: float(value) for name, value in numbers.items()})
    return rows


def compare(
    models: Mapping[Head, FluxAudio], text: Tensor, pooled: Tensor, config: SteeringConfig, bundle: str
) -> dict[str, Any]:
    """Steering of the same weights in several forwards; the first is the one that they were trained in.

    Args:
        text, pooled: (P, T, D) and (P, E), see `steer`.

    Returns:
        What the report holds: `scores`, `prompts`, `steps`, and per forward `moved`, `kept` and `reward`
        (`delta_out`), the latter null with a reason in `no_reward` where it was not measured.
    """
    runs = [steer(model, text, pooled, config) for model in models.values()]
    device = str(next(iter(models.values())).latent_mean.device)
    measured: Sequence[dict[str, float] | None] = [None] * len(runs)
    reason = None if config.reward else "switched off"
    if config.reward:
        try:
            measured = delta_out(bundle, runs, device)
        except UserError as error:  # a run that needs no decoders starts without them
            reason = error.message
    forwards = {
        head: {"moved": run.moved, "kept": run.kept_of(runs[0]), "reward": reward}
        for head, run, reward in zip(models, runs, measured, strict=True)
    }
    report = {"scores": list(config.scores), "prompts": len(text), "steps": config.steps, "bundle": bundle}
    return report | {"forwards": forwards, "no_reward": reason}


def lines(report: Mapping[str, Any]) -> list[str]:
    """A report of `compare` for people."""
    low, high = report["scores"]
    said = [f"steering from s = {low:g} to s = {high:g}, {report['prompts']} prompts:"]
    for head, forward in report["forwards"].items():
        share = "" if forward["kept"] is None else f", {forward['kept']:.0%} of the trained steering"
        reward = forward["reward"]
        heard = f"; delta_out {reward['delta_out']:+.3f} (sd {reward['sd']:.3f})" if reward else ""
        said.append(f"  {head} forward: latents move by {forward['moved']:.3f} sd{share}{heard}")
    if report["no_reward"] is not None:
        said.append(f"  delta_out is not measured: {report['no_reward']}")
    return said


def lost(report: Mapping[str, Any], forward: Head) -> bool:
    """Whether weights that were steered are not in that forward."""
    share = report["forwards"][forward]["kept"]
    return share is not None and share < LOST


def show_steering(
    path: str, heads: Sequence[Head], *, own: Head | None, texts: Sequence[str], bundle: str, reward: bool
) -> int:
    """`ttmray checkpoint steer`: print what a weights file makes of the score, in its own forward and in others.

    Args:
        heads: other forwards, also such as collapse: nothing is made with them.
        own: head that it was trained with; default: the one that the file names.
        texts: prompts.

    Raises:
        UserError: no weights with a score head, or forwards that do not fit.
    """
    device = resolve_device("auto")
    trained = load_backbone(path, head=own, device=device)
    if trained.score_embed is None:
        raise UserError(f"{path} has no score head, so nothing to steer.")
    models: dict[Head, FluxAudio] = {trained.config.head: trained}
    for head in dict.fromkeys(heads):
        crossed = cross_load(trained.config.head, head, path, force=True)
        if crossed is not None and crossed.new_head:
            raise UserError(f"{path}: {head} has other tensors than {trained.config.head}.", "Choose v1, v2 or v4.")
        models.setdefault(head, with_head(trained, head, force=True)[0])
    encoders = open_bundle(bundle).load(["text", "clap_condition"], LoadOptions(device=device))
    if (encoders.text.max_length, encoders.text.dim) != (trained.config.text_len, trained.config.text_dim):
        raise UserError(f"{path} takes other text features than {bundle} gives.", "Name the bundle of its training.")
    text = torch.from_numpy(encoders.text.encode(list(texts)))
    pooled = torch.from_numpy(encoders.clap_condition.embed_text(list(texts)))
    report = compare(models, text, pooled, SteeringConfig(prompts=len(texts), reward=reward), bundle)
    for line in lines(report):
        console.print(line, markup=False)
    for head in models:
        if lost(report, head):
            console.print(f"the score is lost in the {head} forward", style="yellow", markup=False)
    return EXIT_OK
