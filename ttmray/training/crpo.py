"""Stage 3: CRPO, a DPO loss for flow matching on winner and loser of one prompt (paper III-D, Eq. 1).

The loss is that of TangoFlux (Hung et al. 2024), which the paper uses: log pi(x) is approximated by the flow-matching
loss. Winner and loser, policy and reference share one time and one noise. The reference is the whole starting model,
text projections and score head included, in evaluation mode.

Time and noise are new at every draw of a pair, so losses of the reference that are computed ahead (`reference_losses`)
are as many forwards, a quarter of the work; they pay where several runs share them.
"""

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils import get_total_norm

from ttmray.cluster import ActorsConfig, alone, each
from ttmray.config import Location, execution, fingerprint
from ttmray.console import console, meter
from ttmray.errors import UserError
from ttmray.models.backbone import FluxAudio
from ttmray.models.backbone_weights import read_config, tidy
from ttmray.models.state_dicts import read_state_dict
from ttmray.models.weights import weights_file
from ttmray.storage import Folder
from ttmray.training.config import CheckpointConfig, OptimizerConfig, TrainConfig, ValidationConfig
from ttmray.training.data import Samples, corpus_bundle, loader
from ttmray.training.flow_matching import FlowMatchingConfig, flow_losses
from ttmray.training.launch import launch
from ttmray.training.loop import fast_kernels, unsynchronised
from ttmray.training.memory import step_flops
from ttmray.training.pair_mixture import open_pairs
from ttmray.training.pairs import pool_score
from ttmray.training.reference_losses import ReferenceLosses
from ttmray.training.sft import frozen_digest, initial_model, score_facts, write_samples
from ttmray.training.task import Losses, Task

LogRatio = Literal["tangoflux", "equation_1"]
FACTORS: dict[LogRatio, float] = {"tangoflux": 0.5, "equation_1": 1.0}
"""log[pi(x)/pi_ref(x)] = -factor (L(x) - L_ref(x)). TangoFlux's code has the half of a Gaussian's log-density; the
paper's Eq. 1 shows beta without it."""
PairScore = float | Literal["pair", "own"] | None
WATCHED = 10
"""Log lines over which `losers_rise` looks."""


class CrpoFlow(FlowMatchingConfig):
    """Times and dropout, the same for winner, loser, policy and reference."""

    text_dropout: float = Field(0.0, ge=0, le=1)
    """0 as in TangoFlux: then nothing trains the branch without text that guidance also uses."""


class CrpoOptimizer(OptimizerConfig):
    """AdamW with the paper's rate."""

    lr: float = Field(1e-6, gt=0)
    """Learning rate after the warm-up (paper)."""
    warmup: int = Field(100, ge=0)
    """Updates of linear warm-up (public config)."""


class CrpoConfig(TrainConfig):
    """`jobs/train_crpo.py` and `ttmray train-crpo`: Stage 3. `data.sources` is the pool of the pairs."""

    pairs: Location = execution()
    """`pairs.parquet` of `ttmray pairs`. What it holds is part of the identity."""
    beta: float = Field(2000.0, gt=0)
    """Of DPO (paper). Losses are means over frames and channels; for sums it would be divided by their number."""
    log_ratio: LogRatio = "tangoflux"
    """`tangoflux`: beta / 2 times the difference of losses. `equation_1`: beta times, Eq. 1 read to the letter."""
    fm_weight: float = Field(1.0, ge=0)
    """lambda: weight of the winner's flow-matching loss (paper)."""
    score: float | Literal["target", "pair", "own"] | None = "target"
    """What the model is conditioned on; the paper does not say. `target`: the score that the pool was sampled at (none
    where it was sampled without). `pair`: the mean of the two rewards. A number: that. null: no score. `own`: each
    clip's own reward.

    The DPO loss compares log pi(x_w | c, s) with log pi(x_l | c, s) under one condition, as Eq. 1 says: both clips are
    answers to the same prompt and score. With `own` they have different scores, so the head, which learned what clips
    of those rewards look like, can explain the preference by s, and what is left to learn is another thing: to fit
    winners at high scores and to unfit losers at low ones."""
    reference_losses: Location | None = execution(None)
    """Folder (local or s3://) where the reference's losses are computed ahead, unless they are there: runs that differ
    in beta, rates, lambda or length share them (`training/reference_losses.py`). null: the reference runs beside the
    policy."""
    gradients_every: int = execution(100, ge=0)
    """Updates between measurements of the gradient norms of both terms, which cost an update each; 0: never."""
    flow: CrpoFlow = CrpoFlow()
    optimizer: CrpoOptimizer = CrpoOptimizer()
    batch: int = Field(8, ge=1)
    """Pairs per update. The public script says 8, its config 32, the paper nothing."""
    steps: int = Field(5000, ge=1)
    """Updates (paper): 20 epochs of 2,000 pairs."""
    checkpoint: CheckpointConfig = execution(CheckpointConfig(every=500))
    validation: ValidationConfig = execution(ValidationConfig(clips=0))
    """Not used: there are no held-out pairs. Compare checkpoints on held-out prompts instead."""

    @model_validator(mode="after")
    def _for_pairs(self) -> Self:
        if self.model.init is None:
            raise ValueError("model.init is needed: CRPO starts from trained weights, which are its reference")
        if len(self.data.sources) != 1:
            raise ValueError("data.sources must be the one pool that the pairs come from")
        if self.validation.clips:
            raise ValueError("validation.clips must be 0")
        if self.data.guide is not None:
            raise ValueError("data.guide must be null: winner and loser share one time")
        return self


class CrpoLosses(NamedTuple):
    """(B,) each: what is minimised; its DPO term; `inside`, the argument of the log-sigmoid: above 0 the policy
    prefers the winner more than the reference does."""

    total: Tensor
    dpo: Tensor
    inside: Tensor


def crpo_losses(
    winner: Tensor,
    loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    *,
    beta: float = 2000.0,
    fm_weight: float = 1.0,
    factor: float = 0.5,
) -> CrpoLosses:
    """-log sigmoid(-factor beta [(Lw - Ll) - (Lw_ref - Ll_ref)]) + fm_weight Lw of every pair.

    Args:
        winner, loser: (B,) flow-matching losses of the policy, means over frames and channels.
        reference_winner, reference_loser: (B,) of the reference, at the same times and noises.
    """
    inside = -factor * beta * ((winner - loser) - (reference_winner - reference_loser))
    dpo = F.softplus(-inside)  # -log sigmoid
    return CrpoLosses(dpo + fm_weight * winner, dpo, inside)


def losers_rise(lines: Sequence[Mapping[str, float]]) -> bool:
    """Whether the margin grows by worse losers and not by better winners, over the last `WATCHED` log lines.

    Both are losses less those of the reference at the same draws, which takes the noise of the draws out. It does where
    from the older half of the lines to the newer one the loser's loss rises by more than two standard errors, and the
    winner's does not fall.

    Args:
        lines: means of `CrpoTask.losses`'s numbers over a log line each, the newest last; with too few of them: no.
    """
    if len(lines) < WATCHED:
        return False
    sides = [[line[f"{side}_loss"] - line[f"reference_{side}_loss"] for side in ("winner", "loser")] for line in lines]
    older, newer = np.split(np.array(sides[-WATCHED:]), 2)
    rise = newer.mean(0) - older.mean(0)
    error = np.sqrt(newer.var(0, ddof=1) / len(newer) + older.var(0, ddof=1) / len(older))
    return bool(rise[1] > 2 * error[1] and rise[0] >= 0)


class CrpoTask:
    """Stage 3 as the loop sees it.

    Args:
        config: of the run, a `CrpoConfig`.
        device: of this rank.

    Raises:
        UserError: pairs and pool, or weights and model, do not fit.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        assert isinstance(config, CrpoConfig)
        self.config = config
        self.pairs = open_pairs(config.pairs, config.data)
        self.score: PairScore = None  # also where the model takes no score
        source = config.data.sources[0]
        if source.score_column is not None:
            self.score = pool_score(source.corpus) if config.score == "target" else config.score
        self.model, self.init = initial_model(config, self.pairs)
        assert config.model.init is not None
        check_head(self.model, weights_file(config.model.init, "model.init"))
        self.model.to(device)
        self.device = device
        self.identity: dict[str, Any] = {
            "data": self.pairs.fingerprint(),
            "backbone": self.model.config.to_dict(),
            "init": self.init,
            "frozen": frozen_digest(self.model),
        }
        self.facts = score_facts(config, _seen(self.pairs.scores(), self.score))
        self.table: ReferenceLosses | None = None
        """Opened by `batches`, or by whoever makes the losses."""
        self.reference: FluxAudio | None = None
        if config.reference_losses is None:
            self.reference = copy.deepcopy(self.model).eval().requires_grad_(False)
            # compiled like the policy: rounding errors that both share cancel before beta multiplies them
            self._refer = torch.compile(self.reference) if config.runtime.compile else self.reference
        # two clips forward and backward, and forward through the reference
        self.clips_per_sample, self.frozen_models = 2, int(self.reference is not None)
        self.flops_per_sample = step_flops(self.model.config) * (2 + 2 / 3 * self.frozen_models)
        self.rank = 0

    def open_table(self, device_batch: int, device: torch.device) -> ReferenceLosses | None:
        """The reference's losses as made in batches of `device_batch` on that device; None where it runs beside."""
        folder = self.config.reference_losses
        if folder is not None:
            key = _reference_key(self.config, self.identity, self.score, device_batch, device)
            self.table = ReferenceLosses(folder, key)
        return self.table

    def batches(self, start: int, batch: int, rank: int, world: int, pin: bool) -> Generator[Samples, None, None]:
        self.rank = rank
        self.open_table(batch, self.device)
        yield from loader(self.pairs, self.config.data, start=start, batch=batch, rank=rank, world=world, pin=pin)

    def losses(self, samples: Samples, forward: Callable[..., Tensor]) -> Losses:
        samples = self.scored(samples)
        every, update = self.config.gradients_every, int(samples.numbers[0]) // self.config.batch
        measured = self.gradient_norms(samples, forward) if every and update % every == 0 else {}
        winner, loser, reference_winner, reference_loser, pair, t = self._terms(samples, forward)
        extra = {
            "winner_loss": winner,
            "loser_loss": loser,
            "reference_winner_loss": reference_winner,
            "reference_loser_loss": reference_loser,
            "margin": pair.inside,
            "implicit_accuracy": (pair.inside > 0).float(),
            **measured,
        }
        return Losses(pair.total, t, extra)

    def gradient_norms(self, samples: Samples, forward: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Norms () of the gradients of the two terms of the loss, and their ratio (), on a micro-batch of this rank.

        Nothing of it touches the gradients of the update. Each term has a forward of its own, because a compiled
        model goes backward once.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norms = []
        for fm in (False, True):
            with unsynchronised(forward):  # the model that trains, but for this rank alone
                winner, *_, pair, _ = self._terms(samples, forward)
            term = self.config.fm_weight * winner.mean() if fm else pair.dpo.mean()
            gradients = torch.autograd.grad(term, parameters, allow_unused=True)
            norms.append(get_total_norm([g for g in gradients if g is not None]))
        ratio = norms[0] / norms[1].clamp_min(1e-30)
        return {"dpo_grad_norm": norms[0], "fm_grad_norm": norms[1], "dpo_fm_grad_ratio": ratio}

    def _terms(
        self, samples: Samples, forward: Callable[..., Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, CrpoLosses, Tensor]:
        """Losses of winner and loser, of both by the reference, of the pair; and times. All (B,)."""
        with _alike(self.config):
            policy, t = flow_losses(self.model, samples.batch, self.config.flow, forward)
        winner, loser = policy.chunk(2)
        if self.table is not None:
            reference = self.table.rows(samples.numbers.chunk(2)[0]).to(policy.device)
        else:
            reference = self.reference_losses(samples)
        reference_winner, reference_loser = reference.unbind(1)
        pair = crpo_losses(
            winner,
            loser,
            reference_winner,
            reference_loser,
            beta=self.config.beta,
            fm_weight=self.config.fm_weight,
            factor=FACTORS[self.config.log_ratio],
        )
        return winner, loser, reference_winner, reference_loser, pair, t.chunk(2)[0]

    @torch.no_grad()
    def reference_losses(self, samples: Samples) -> Tensor:
        """(B, 2) losses of winner and loser by the reference, of scored samples on its device."""
        assert self.reference is not None
        with _alike(self.config):
            losses, _ = flow_losses(self.reference, samples.batch, self.config.flow, self._refer)
        return torch.stack(losses.chunk(2), dim=1)

    def scored(self, samples: Samples) -> Samples:
        """Conditioned as `score` says; samples of winners and losers that still have their own rewards."""
        own, score = samples.batch.score, self.score
        if own is None or score == "own":
            return samples
        one = own.reshape(2, -1).mean(0).repeat(2) if score == "pair" else None
        if isinstance(score, float):
            one = own.new_full(own.shape, score)
        return samples._replace(batch=samples.batch._replace(score=one))

    def validate(self, device: torch.device, rank: int, world: int) -> None:
        return None

    def sample(self, folder: Folder, step: int) -> None:
        write_samples(self.model, self.config, corpus_bundle(self.config.data), folder, step)

    def note(self, start: int, stop: int, lines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """`loser_rises`: see `losers_rise`. Said aloud where it begins."""
        rises = losers_rise(lines)
        if rises and not self.rank and not losers_rise(list(lines)[:-1]):
            console.print(
                f"update {stop // self.config.batch}: over the last {WATCHED} log lines the losers' loss rose "
                "and the winners' did not fall: the policy unlearns losers and learns nothing from winners. Compare "
                "earlier checkpoints, or lower optimizer.lr.",
                style="yellow",
            )
        return {"loser_rises": rises}


def _seen(own: np.ndarray, score: PairScore) -> np.ndarray:
    """(2, n) scores that pairs are conditioned on, of their own rewards (2, n); NaN for none."""
    if score == "own":
        return own
    if score == "pair":
        return np.repeat(own.mean(0, keepdims=True), 2, axis=0)
    return np.full_like(own, np.nan if score is None else score)


def _alike(config: CrpoConfig) -> AbstractContextManager[object]:
    """Compiled code rounds intermediates to bfloat16 wherever the model does.

    Else it keeps more digits where operations are fused, and they are fused in other places with gradients (policy)
    than without (reference): beta makes 0.6 of that.
    """
    if not config.runtime.compile or config.precision != "bf16":
        return nullcontext()
    import torch._inductor.config as inductor

    patched: AbstractContextManager[object] = inductor.patch(emulate_precision_casts=True)
    return patched


def check_head(model: FluxAudio, path: Path) -> None:
    """The score head of the weights must be the model's: the reference cannot have a new one.

    Raises:
        UserError: it has other tensors. What heads with the same tensors may do is the rule of `initial_model`.
    """

    def score_shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("score_embed.")}

    theirs = score_shapes(tidy(read_state_dict(path), str(path)))
    head, named = model.config.head, read_config(path).get("head")
    if theirs != score_shapes(model.state_dict()):
        what = f"the score head {named or 'of another shape'}" if theirs else "no score head"
        raise UserError(
            f"model.init: {path} has {what}, model.head is {head}.",
            "v1, v2 and v4 share their tensors; else choose the head of the weights.",
        )


def train_crpo(config: CrpoConfig, *, plan_only: bool = False, force: bool = False) -> int:
    """Stage 3 from start to end, or from where it was; returns the exit code."""
    return launch("crpo", config, CrpoTask, plan_only=plan_only, force=force, keep=_precompute)


def _reference_key(
    config: CrpoConfig, identity: dict[str, Any], score: PairScore, device_batch: int, device: torch.device
) -> str:
    """Of everything that decides the losses of a reference: its weights, the pairs, draws and score, and how numbers
    are rounded."""
    same = {name: identity[name] for name in ("data", "backbone", "init", "frozen")}
    same |= {"flow": config.flow.model_dump(mode="json"), "score": score, "precision": config.precision}
    same |= {"device": device.type, "compile": config.runtime.compile}
    same |= {"device_batch": device_batch} if config.precision == "bf16" else {}
    return fingerprint(same)[:16]


def _precompute(config: TrainConfig, task: Task, device_batch: int, device: torch.device) -> None:
    """Make the reference's losses of a run that are not there yet, where it is to read them.

    They are made on the device of the training, in bf16 also in its batches: rounding that policy and reference share
    cancels before beta multiplies it.
    """
    assert isinstance(config, CrpoConfig)
    assert isinstance(task, CrpoTask)
    table = task.open_table(device_batch, device)
    if table is None:
        return
    todo = table.missing(config.steps * config.batch)
    runtime = config.runtime
    gpus = float(device.type == "cuda")
    pool = ActorsConfig(
        runner=runtime.runner, device=device.type, workers=runtime.workers, cpus=runtime.cpus, gpus=gpus
    )
    make = partial(_ReferencePart, config.model_dump_json(), str(device), device_batch)
    with alone(), meter("reference, pairs", len(todo) * ReferenceLosses.PART) as progress:
        for part, losses in each(make, todo, pool):
            table.write(part, losses)
            progress.advance(ReferenceLosses.PART)


class _ReferencePart:
    """The reference in one process; a call makes a part of its losses."""

    def __init__(self, config: str, device: str, batch: int) -> None:
        self.config = CrpoConfig.model_validate_json(config).model_copy(update={"reference_losses": None})
        self.device, self.batch = torch.device(device), batch
        fast_kernels(self.device)  # it rounds as the training does
        self.task = CrpoTask(self.config, self.device)

    def __call__(self, part: int) -> tuple[int, Tensor]:
        parts: list[Tensor] = []
        batches = loader(self.task.pairs, self.config.data, start=part * ReferenceLosses.PART, batch=self.batch)
        for _, samples in zip(range(-(-ReferenceLosses.PART // self.batch)), batches, strict=False):
            samples = self.task.scored(samples.to(self.device))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                parts.append(self.task.reference_losses(samples).float().cpu())
        return part, torch.cat(parts)[: ReferenceLosses.PART]
