"""Online GRPO: the model draws groups of clips for each prompt, they are scored, and a policy gradient follows.

After Flow-GRPO (Liu et al. 2025) and Resonate, a FluxAudio trainer. A round draws and scores, then makes `updates`
steps of the clipped policy loss, with the KL to the parent. The loop, checkpoints and launching are those of every
training: a sample is one drawn step of one clip, and its number says which.

What keeps it small: states are stored in float16 as they were drawn; the parent's means of the steps are stored when
they are drawn, so no second model is in memory while training; transitions lie in host memory.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ttmray.config import Config, Location, execution, fingerprint
from ttmray.errors import UserError
from ttmray.generation.pool import choose_prompts
from ttmray.generation.prompts import Prompt, read_prompts
from ttmray.generation.sampler import branch_count, guided, make_branches, time_grid
from ttmray.models.backbone import BackboneConfig, Conditions, FluxAudio
from ttmray.models.backbone_weights import load_backbone, read_support, score_warning
from ttmray.models.bundle import open_bundle
from ttmray.models.scoring import Scorer
from ttmray.models.weights import digest_file, released, weights_file
from ttmray.storage import Folder
from ttmray.training.checkpoint import load, newest_valid
from ttmray.training.config import CheckpointConfig, LoopConfig, OptimizerConfig, TrainRuntime, ValidationConfig
from ttmray.training.launch import TRANSITIONS, Row, launch, require_memory
from ttmray.training.loop import CHECKPOINTS
from ttmray.training.memory import Split, step_flops
from ttmray.training.policy_gradient import policy_losses, step_kl
from ttmray.training.rollouts import RolloutConfig, RolloutRun, Share, roll_out, round_seed
from ttmray.training.rounds import (
    DIGITS,
    POLICY,
    WATCH,
    Column,
    Round,
    Transitions,
    describe_round,
    describe_watched,
    hacked,
    open_round,
    policy_bytes,
    prompts_of_round,
    read_report,
    reopen_round,
    round_name,
    sweep_rounds,
    write_report,
)
from ttmray.training.sft import frozen_digest, write_samples
from ttmray.training.task import Losses

VOCODER_BYTES = 420_000_000
"""Float32 activations of BigVGAN per clip of 10 s."""


class GrpoOptimizer(OptimizerConfig):
    """AdamW with the public trainer's rate."""

    lr: float = Field(1e-4, gt=0)
    """Learning rate (public trainer)."""
    warmup: int = Field(0, ge=0)
    """Updates of linear warm-up."""


class WatchConfig(Config):
    """Held-out prompts, sampled as at inference by the weights of every round: is more reward better music?"""

    prompts: Location | None = execution(None)
    """File of prompts; null: those of `rollouts.held_out`, and without them nothing is watched."""
    clips: int = Field(1, ge=1, le=256)
    """Per prompt, with the same noise in every round."""
    steps: int = Field(25, ge=1, le=1000)
    """Steps of the sampler."""
    every: int = Field(1, ge=1)
    """Rounds; the first and the end are always watched."""


class GrpoRuntime(TrainRuntime):
    """Where and how fast."""

    samplers: int = Field(0, ge=0)
    """0: the processes that train also sample, on their devices. n: so many Ray actors sample, on GPUs of their own
    where the training has GPUs."""
    watchdog_s: float = Field(14_400.0, gt=0)
    """As elsewhere; sampling a round counts as one update."""


class GrpoConfig(LoopConfig):
    """`jobs/train_grpo.py` and `ttmray train-grpo`: online GRPO from a trained parent."""

    rollouts: RolloutConfig
    """What is sampled: parent (`checkpoint`), prompts, K (`candidates`), sampler, noise. Its precision is that of the
    run; its output and places are the run's."""
    rewards: dict[Column, float] = Field({"reward_score": 1.0}, min_length=1)
    """Weights of the columns whose sum is the reward."""
    prompts_per_round: int = Field(8, ge=1)
    """Prompts of a round, each with K clips."""
    updates: int = Field(2, ge=1)
    """Updates of a round. Samples are never older than this, less one."""
    trained_share: float = Field(0.99, gt=0, le=1)
    """Share of a clip's steps that is trained, rounded down: 9 of 10 (public trainer)."""
    trained_steps: Literal["first", "spread"] = "first"
    """The first ones, as in the public trainer, or equally far ones."""
    global_std: bool = True
    """Advantages are divided by the deviation of all rewards of a round; else of a prompt's."""
    advantage_limit: float = Field(5.0, gt=0)
    """Largest size of an advantage."""
    clip_range: float = Field(1e-4, gt=0, lt=1)
    """Of the ratio; so small because log-probabilities are means over frames and channels."""
    beta: float = Field(0.04, ge=0)
    """Weight of the KL to the parent."""
    ratio_tolerance: float = execution(1e-4, gt=0)
    """How far from 1 a mean ratio of the first micro-batch of a round may be before the run stops."""
    watch: WatchConfig = WatchConfig()
    optimizer: GrpoOptimizer = GrpoOptimizer()
    batch: int = Field(864, ge=1)
    """Drawn steps per update: 864 are 96 clips with 9 trained steps."""
    steps: int = Field(1000, ge=1)
    """Updates in all."""
    checkpoint: CheckpointConfig = execution(CheckpointConfig(every=10))
    validation: ValidationConfig = execution(ValidationConfig(clips=0))
    """Not used: see `watch`."""
    runtime: GrpoRuntime = execution(GrpoRuntime())

    @property
    def draw_seed(self) -> int:
        return self.rollouts.seed % 2**32

    @property
    def beside(self) -> tuple[int, float]:
        return self.runtime.samplers, self.rollouts.runtime.cpus

    @property
    def chosen_steps(self) -> list[int]:
        """Steps of a clip that are trained, in order."""
        count = self.rollouts.sampler.steps
        chosen = max(1, int(count * self.trained_share))
        return [i if self.trained_steps == "first" else i * count // chosen for i in range(chosen)]

    @property
    def rounds(self) -> int:
        return -(-self.steps // self.updates)

    @model_validator(mode="after")
    def _for_rounds(self) -> Self:
        if self.rollouts.checkpoint is None:
            raise ValueError("rollouts.checkpoint is needed: GRPO starts from trained weights, which are its parent")
        if self.validation.clips:
            raise ValueError("validation.clips must be 0: see watch")
        if self.rollouts.kind == "cps" and self.chosen_steps[-1] == self.rollouts.sampler.steps - 1:
            raise ValueError("trained_share: the last step of cps draws nothing, so it cannot be trained")
        if not any(self.rewards.values()):
            raise ValueError("rewards: all weights are 0")
        return self


class GrpoTask:
    """Online GRPO as the loop sees it.

    Args:
        config: of the run.
        device: of this rank.

    Raises:
        UserError: prompts, weights or models that are not there or do not fit.
    """

    def __init__(self, config: GrpoConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.out = Folder.at(config.output)
        rollouts = config.rollouts
        assert rollouts.checkpoint is not None
        self.prompts, self.watched = choose_prompts(rollouts).chosen, watched_prompts(config)
        if len(self.prompts) < config.prompts_per_round:
            raise UserError(
                f"there are {len(self.prompts)} prompts, prompts_per_round is {config.prompts_per_round}.",
                "Lower prompts_per_round.",
            )
        self.model = trainable(config).to(device)
        bundle, parent = open_bundle(rollouts.bundle), weights_file(rollouts.checkpoint, "rollouts.checkpoint")
        self.identity: dict[str, Any] = {
            "data": fingerprint([[prompt.id, prompt.text] for prompt in (*self.prompts, *self.watched)]),
            "backbone": self.model.config.to_dict(),
            "init": digest_file(parent).sha256,
            "frozen": frozen_digest(self.model),
            "bundle": bundle.identity(),
            "protocol": bundle.protocol(rollouts.reward_text).id(),
        }
        support = read_support(parent)
        self.facts: dict[str, Any] = {} if support is None else {"score_support": support.to_dict()}
        self.table, self.grid = rollouts.table(), time_grid(rollouts.sampler.steps).to(device)
        self.weights = rollouts.sampler.weights(0)
        self.clips_per_sample, self.frozen_models = branch_count(self.weights), 0
        self.flops_per_sample = self.clips_per_sample * step_flops(self.model.config)
        self.first = True
        self.number = -1

    def batches(self, start: int, batch: int, rank: int, world: int, pin: bool) -> Generator[Transitions, None, None]:
        self.first = rank == 0
        share = Share(rank, world, self.config.runtime.samplers, str(self.device))
        per_round = self.config.updates * self.config.batch
        position = start + rank * batch
        while True:
            number = position // per_round
            if number != self.number:
                self.number, drawn = number, self.draw(number, share, begins=start <= number * per_round)
            yield drawn.read(range(position, position + batch), number * per_round)
            position += world * batch

    def draw(self, number: int, share: Share, begins: bool) -> Round:
        """What a round has drawn, by the weights as they are where it begins."""
        config, rollouts = self.config, self.config.rollouts
        if begins and self.first:
            sweep_rounds(self.out, config.updates, config.checkpoint.keep, number)
        folder = (
            open_round(self.out, number, self.model, self.facts, self.first)
            if begins
            else reopen_round(self.out, number)
        )
        prompts = prompts_of_round(self.prompts, number, config.prompts_per_round, rollouts.seed)
        groups = roll_out(rollout_run(config, number, folder), prompts, share)
        drawn = Round(
            groups,
            config.rewards,
            config.chosen_steps,
            global_std=config.global_std,
            limit=config.advantage_limit,
            seed=round_seed(rollouts.seed, number),
        )
        if begins:
            held_out = watch(config, number, folder, self.watched, share)
            if self.first:
                told = {"round": number, "update": number * config.updates, "policy": folder.uri[-DIGITS:]}
                told |= {**describe_round(drawn, groups), "held_out": held_out}
                start = told if number == 0 else read_report(self.out, 0)
                write_report(self.out, told | {"warning": hacked(told, start) if start is not None else None})
        return drawn

    def losses(self, samples: Transitions, forward: Callable[..., Tensor]) -> Losses:
        config = self.config
        t = self.grid[samples.step]
        v = policy_velocity(self.model, samples, t, forward, self.weights, config.rollouts.sampler.score)
        mean = self.table.mean(samples.x, v, samples.step)
        log_prob = self.table.log_prob(samples.after, mean, samples.step)
        kl = step_kl(mean, samples.reference, self.table.std.to(mean.device)[samples.step])
        losses = policy_losses(
            log_prob, samples.log_prob, samples.advantage, kl, clip_range=config.clip_range, beta=config.beta
        )
        update = int(samples.numbers[0]) // config.batch
        if update % config.updates == 0:
            self.check_first_ratio(losses.ratio)
        extra = {
            "policy_loss": losses.policy,
            "kl": losses.kl,
            "ratio": losses.ratio,
            "clipped": ((losses.ratio - 1).abs() > config.clip_range).float(),
            "advantage": samples.advantage.abs(),
            "stale_updates": torch.full_like(losses.ratio, update % config.updates),
        }
        return Losses(losses.total, t, extra)

    def check_first_ratio(self, ratio: Tensor) -> None:
        """See that the policy is the one that drew its samples, before it has changed.

        Args:
            ratio: (B,) of a micro-batch of the first update of a round.

        Raises:
            UserError: they are not 1.
        """
        off = float((ratio.detach() - 1).abs().mean())
        if not off <= self.config.ratio_tolerance:
            raise UserError(
                f"round {self.number}: before the first update the ratios differ from 1 by {off:.3g} on average, "
                f"ratio_tolerance is {self.config.ratio_tolerance:g}: sampling and training do not compute the same "
                "policy.",
                "Usual reasons: bf16 with other batches or kernels (precision=fp32, runtime.compile=false), or weights "
                "of another machine. A difference far below clip_range does no harm: raise ratio_tolerance.",
            )

    def validate(self, device: torch.device, rank: int, world: int) -> None:
        return None

    def sample(self, folder: Folder, step: int) -> None:
        write_samples(self.model, self.config, self.config.rollouts.bundle, folder, step)

    def note(self, start: int, stop: int, lines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """Numbers of the round that the last update belongs to."""
        number = max(0, stop - 1) // (self.config.updates * self.config.batch)
        told = read_report(self.out, number) if self.first else None
        if told is None:
            return {}
        values = {name: told[name] for name in ("round", "reward", "group_spread", "failed", "left_out")}
        if held_out := told.get("held_out"):
            values |= {f"held_out_{name}": score["mean"] for name, score in held_out["scores"].items()}
            values |= {name: held_out[name] for name in ("diversity", "distance")}
        return values | {"hacking": told["warning"] is not None}


def trainable(config: GrpoConfig) -> FluxAudio:
    """The parent's weights in a model whose weights have gradients.

    Raises:
        UserError: no such weights, or a score for weights without a head.
    """
    rollouts = config.rollouts
    assert rollouts.checkpoint is not None
    parent = load_backbone(rollouts.checkpoint, head=rollouts.head, null=rollouts.null, force=rollouts.force_head)
    if rollouts.sampler.score is not None and parent.score_embed is None:
        raise UserError(
            f"rollouts.sampler.score is {rollouts.sampler.score:g}, but {rollouts.checkpoint} has no score head.",
            "Set rollouts.sampler.score=null.",
        )
    model = FluxAudio(parent.config)
    model.load_state_dict(parent.state_dict())
    return model


def policy_velocity(
    model: FluxAudio,
    samples: Transitions,
    t: Tensor,
    forward: Callable[..., Tensor],
    weights: tuple[float, ...],
    score: float | None,
) -> Tensor:
    """Velocity (B, N, C) at times t (B,) with guidance, all branches of which have gradients."""
    texts = [Conditions(tokens, pooled[:, None]) for tokens, pooled in zip(samples.tokens, samples.pooled, strict=True)]
    branches = make_branches(model, texts[0], texts[1], score, two_axis=len(weights) == 2)

    def velocity(x: Tensor, t: Tensor, raw: Conditions, score: Tensor | None, null: Tensor | None) -> Tensor:
        return forward(x, t, raw.tokens, raw.pooled[:, 0], score, null)

    return guided(velocity, samples.x.float(), t, branches, weights)


def watched_prompts(config: GrpoConfig) -> list[Prompt]:
    """Prompts of the watch; empty where there are none."""
    source = config.watch.prompts or config.rollouts.held_out
    return [] if source is None else read_prompts(source)


def rollout_run(config: GrpoConfig, number: int, folder: Folder) -> RolloutRun:
    """The rollouts of a round, by the weights in its folder."""
    return _run(config, folder.path(POLICY), folder.uri, seed=round_seed(config.rollouts.seed, number))


def _run(config: GrpoConfig, weights: str, output: str, **changed: Any) -> RolloutRun:
    rollouts = config.rollouts
    same = {name: getattr(rollouts, name) for name in RolloutConfig.model_fields}
    sampler = rollouts.sampler.model_copy(update={"precision": config.precision})
    same |= {"checkpoint": weights, "output": output, "reference": rollouts.checkpoint, "sampler": sampler}
    # a policy file says its own head and null; the parent's were made those of the run when it was loaded
    return RolloutRun(**{**same, **changed})


def watch(
    config: GrpoConfig, number: int, folder: Folder, prompts: Sequence[Prompt], share: Share
) -> dict[str, Any] | None:
    """What became of held-out clips by the weights of a round (`describe_watched`); None where nothing is watched.

    Args:
        folder: of the round.
    """
    if not prompts or (number % config.watch.every and number < config.rounds):
        return None
    sampler = config.rollouts.sampler.model_copy(update={"steps": config.watch.steps})
    plain: dict[str, Any] = {"plain": True, "sampler": sampler.model_copy(update={"precision": config.precision})}
    plain |= {"candidates": config.watch.clips}
    place, parent = Folder.at(config.output).sub(WATCH), config.rollouts.checkpoint
    assert parent is not None
    parents = roll_out(_run(config, parent, place.path("parent"), **plain), prompts, share)
    groups = parents
    if number:
        groups = roll_out(_run(config, folder.path(POLICY), place.path(_name(folder)), **plain), prompts, share)
    return describe_watched(groups, parents, config.rewards)


def _name(folder: Folder) -> str:
    return folder.name


def watch_the_end(config: GrpoConfig, device: torch.device) -> None:
    """The report of the weights that a run ends with: held-out clips alone."""
    out, prompts = Folder.at(config.output), watched_prompts(config)
    number, old = config.rounds, read_report(Folder.at(config.output), config.rounds)
    if not prompts or (old is not None and old["update"] == config.steps):
        return
    name = newest_valid(out.sub(CHECKPOINTS))
    assert name is not None  # the run has just ended
    state = load(out.sub(CHECKPOINTS), name)
    data, digest = policy_bytes(state.model, state.identity["backbone"], state.facts)
    folder = out.sub(TRANSITIONS).sub(f"{round_name(number)}-{digest}")
    folder.write(POLICY, data)
    held_out = watch(config, number, folder, prompts, Share(actors=config.runtime.samplers, device=str(device)))
    before, start = read_report(out, number - 1), read_report(out, 0)
    told = {"round": number, "update": config.steps, "policy": digest, "held_out": held_out}
    last = {name: before[name] for name in ("reward", "reward_error")} if before else {}
    write_report(out, told | {"warning": hacked({**last, **told}, start) if start else None})


def memory_rows(config: GrpoConfig, task: GrpoTask, split: Split) -> list[Row]:
    """Rows of the plan: rounds, what is stored of them, and memory while sampling.

    Raises:
        UserError: sampling is estimated to need more than `runtime.memory_gb`.
    """
    rollouts, runtime = config.rollouts, config.runtime
    clips = config.prompts_per_round * rollouts.candidates
    shown = config.updates * config.batch / (clips * len(config.chosen_steps))
    stored = clips * stored_bytes(task.model.config, rollouts.sampler.steps)
    phase = sampling_bytes(config, task.model.config, split)
    most = runtime.memory_gb
    if most is not None:
        require_memory(sum(phase.values()), most, "sampling")
    parts = ", ".join(f"{size / 2**30:.2f} {name}" for name, size in phase.items())
    where = f"{runtime.samplers} actors" if runtime.samplers else "the training's devices, between updates"
    every = f"{len(config.chosen_steps)} of {rollouts.sampler.steps} steps trained"
    return [
        (
            "rounds",
            f"{config.rounds:,}",
            f"{config.updates} updates each, samples are at most {config.updates - 1} old",
        ),
        ("clips", f"{clips:,}", f"per round: {config.prompts_per_round} prompts x {rollouts.candidates}; {every}"),
        ("passes", f"{shown:.2f}", "how often a round's drawn steps are seen, where no clip is left out"),
        ("stored per round", f"{stored / 2**30:.2f} GiB", "float16 states and means of the parent, in host memory"),
        ("memory to sample", f"{sum(phase.values()) / 2**30:.2f} GiB", f"on {where}, estimate: {parts}"),
    ]


def stored_bytes(backbone: BackboneConfig, steps: int) -> int:
    """Bytes of the drawn steps of a clip."""
    return 2 * (2 * steps + 1) * backbone.latent_len * backbone.latent_dim + 4 * steps


def sampling_bytes(config: GrpoConfig, backbone: BackboneConfig, split: Split) -> dict[str, float]:
    """Bytes on a device while a round is sampled, by kind.

    The models of a released bundle count by the size of their files; those of other bundles are small and do not count.
    """
    with torch.device("meta"):
        weights = 4 * sum(p.numel() for p in FluxAudio(backbone).parameters())
    roles = {"text", "clap_condition", "latents", "vocoder", *Scorer.roles}
    names = set(open_bundle(config.rollouts.bundle).weights(roles))
    models = sum(
        entry.approximate_size or sum(file.size or 0 for file in entry.files)
        for entry in released().entries
        if entry.name in names
    )
    batch = config.rollouts.runtime.batch
    phase = {"policy and parent": 2.0 * weights, "models that decode and score": float(models)}
    phase["activations of the vocoder"] = float(batch * VOCODER_BYTES * backbone.latent_len / 430)
    return phase if config.runtime.samplers else {"state of the training": float(split.state_bytes), **phase}


def train_grpo(config: GrpoConfig, *, plan_only: bool = False, force: bool = False) -> int:
    """Online GRPO from start to end, or from where it was; returns the exit code."""
    score_warning(str(config.rollouts.checkpoint), config.rollouts.sampler.score, "rollouts.sampler.score")
    return launch(
        "grpo", config, GrpoTask, plan_only=plan_only, force=force, more_of_plan=memory_rows, after=watch_the_end
    )
