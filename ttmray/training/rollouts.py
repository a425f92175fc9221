"""Groups of clips for online GRPO: drawn steps with their probabilities, decoded, scored; a file per prompt.

The stages, crash guard and quarantine are those of pools (`generation/pool_worker.py`). What is new is the first stage,
which keeps whole paths, and the last, which writes them. That a prompt's file is there and whole is its commit; it is
not made again. So a group depends neither on who makes it, this process or a Ray actor, nor on interruptions.
"""

import hashlib
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ttmray.cluster import ActorsConfig, alone, each
from ttmray.config import Location, execution
from ttmray.console import console
from ttmray.corpus.pipeline import whole_worker
from ttmray.corpus.running import Makers
from ttmray.corpus.stage import Stage
from ttmray.corpus.stages import Measure
from ttmray.corpus.unit import OK, Unit
from ttmray.errors import UserError
from ttmray.generation.pool import plan_pool
from ttmray.generation.pool_worker import (
    CandidatesConfig,
    Judge,
    PoolJob,
    PoolSampler,
    Sample,
    Vocode,
    candidates,
    draw_of,
    make_sampler,
    make_scorer,
)
from ttmray.generation.prompts import Prompt
from ttmray.generation.sampler import SCORE_LIMIT, Sampler, Score, time_grid
from ttmray.generation.stochastic import Kind, Steps, make_steps
from ttmray.models import require_finite
from ttmray.models.backbone_weights import load_backbone
from ttmray.models.bundle import Models, open_bundle
from ttmray.storage import Folder
from ttmray.training.tensors import pack, unpack

ROW = ("key", "prompt_id", "candidate", "status", "stage", "reason", "message", "reward_score", "clap_score", "lufs")
"""What is stored of a clip's row."""
POLL_S = 1.0
"""Seconds between looks for the groups of other processes."""


class RolloutSampler(PoolSampler):
    """The sampler of rollouts: few steps, one weight of guidance throughout."""

    steps: int = Field(10, ge=2, le=1000)
    """Steps of a rollout; ten are enough to learn for more at inference (Flow-GRPO)."""
    weight: float = Field(4.5, ge=0, le=100)
    """w of Eq. 2, in sampling and in the policy that is trained (public trainer)."""
    score: Score = Field(None, ge=-SCORE_LIMIT, le=SCORE_LIMIT)
    """Score that clips are sampled and trained for; null: none."""

    @model_validator(mode="after")
    def _plain(self) -> Self:
        if (self.solver, self.schedule, self.min_sigma) != ("euler", "constant", 0.0):
            raise ValueError("rollouts need solver: euler, schedule: constant and min_sigma: 0")
        return self


class RolloutConfig(CandidatesConfig):
    """Which clips are drawn, and how they are scored. `checkpoint` is the parent: where the policy starts, and what its
    KL is measured from."""

    candidates: int = Field(24, ge=2, le=256)
    """K: clips per prompt, whose rewards are compared."""
    sampler: RolloutSampler = RolloutSampler()
    kind: Kind = "sde"
    """How steps are drawn (generation/stochastic.py)."""
    noise_level: float = Field(0.7, gt=0, le=1)
    """Of the drawn steps."""

    def table(self) -> Steps:
        """The drawn steps, as coefficients (steps,)."""
        return make_steps(time_grid(self.sampler.steps), self.kind, self.noise_level)


class RolloutRun(RolloutConfig):
    """What one process needs to make the groups of a round: the round's weights, folder and seed in a `RolloutConfig`.

    Attributes:
        plain: clips as inference makes them: no step is drawn, no path is stored.
        reference: weights whose means of the steps are stored: the parent's.
    """

    candidates: int = Field(1, ge=1, le=256)
    plain: bool = execution(False)
    reference: Location | None = execution(None)


class RolloutJob(PoolJob):
    """The stages of a `RolloutRun`."""

    @property
    def pool(self) -> RolloutRun:
        return RolloutRun.model_validate_json(self.config)

    def makers(self) -> Makers:
        config, threads = self.pool, self.pool.runtime.thread_count

        def paths(models: Models) -> Stage:
            assert config.reference is not None
            how: dict[str, Any] = {"head": config.head, "null": config.null, "force": config.force_head}
            parent = load_backbone(config.reference, **how, device=models.backbone.latent_mean.device)
            reference = make_sampler(config, Models(**{**vars(models), "backbone": parent}))
            return SamplePaths(config, make_sampler(config, models), reference)

        first: Makers = {SamplePaths: paths}
        if config.plain:
            first = {Sample: lambda models: Sample(config, make_sampler(config, models))}
        return {
            **first,
            Vocode: lambda models: Vocode(config, models.latents, threads),
            Measure: lambda _: Measure(config.silence_dbfs),
            Judge: lambda models: Judge(config, make_scorer(config, models, threads)),
            WriteGroup: lambda models: WriteGroup(config, make_sampler(config, models)),
        }


class SamplePaths(Stage):
    """Rows -> `states` (n, S + 1, N, C) and `means` (n, S, N, C) float16, `log_probs` (n, S) float32, and `latent_mean`
    (n, N, C) float16, the last states as the VAE sees them.

    Args:
        policy: draws.
        reference: whose means are stored.
    """

    name, resources = "sample", "models"
    model_roles = ("backbone", "text", "clap_condition")
    writes = ("states", "means", "log_probs", "latent_mean")

    def __init__(self, config: RolloutRun, policy: Sampler, reference: Sampler) -> None:
        self.config, self.policy, self.reference = config, policy, reference

    def __call__(self, unit: Unit) -> Unit:
        draws, steps = [draw_of(row, self.config) for row in unit.ok_rows()], self.config.table()
        with np.errstate(over="ignore"):  # it is said with the items' names
            states, log_probs = self.policy.paths(draws, steps)
            means = require_finite(self.reference.step_means(draws, states, steps), "means as float16")
            latents = require_finite(self.policy.unnormalise(states[:, -1]).astype(np.float16), "latents as float16")
        unit.clips = {"states": states, "means": means, "log_probs": log_probs, "latent_mean": latents}
        return unit


class WriteGroup(Stage):
    """The file of a prompt: arrays of its ok clips, its features, and all rows in the description."""

    name, scope = "write", "unit"
    reads = ("states", "means", "log_probs", "clap_audio")
    model_roles = ("backbone", "text", "clap_condition")

    def __init__(self, config: RolloutRun, sampler: Sampler) -> None:
        self.run, self.config, self.sampler = Folder.at(config.output), config, sampler

    def __call__(self, unit: Unit) -> Unit:
        arrays = {name: unit.clips[name] for name in self.reads if name in unit.clips}
        if "clap_audio" in arrays:
            arrays["clap_audio"] = arrays["clap_audio"][:, 0]
        if not self.config.plain:
            arrays["tokens"], arrays["pooled"] = self.sampler.text_features([draw_of(unit.rows[0], self.config)])
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        rows = [{name: row.get(name) for name in ROW} for row in unit.rows]
        self.run.write(_file(unit.name), pack(tensors, {"rows": rows}))
        return unit


class ClipGroup(NamedTuple):
    """What was made for a prompt: rows of all its clips, and tensors whose first axis runs over those that are ok:
    `states` (n, S + 1, N, C), `means` (n, S, N, C), `log_probs` (n, S), `clap_audio` (n, 512). `tokens` (2, T, D) and
    `pooled` (2, E) are of the prompt and of the negative text. Plain clips have `clap_audio` alone."""

    rows: list[dict[str, Any]]
    tensors: dict[str, Tensor]

    @property
    def ok(self) -> list[dict[str, Any]]:
        """Rows that the tensors belong to."""
        return [row for row in self.rows if row["status"] == OK]


class Share(NamedTuple):
    """Which of how many processes this one is, and in how many Ray actors the groups are made; 0: here."""

    rank: int = 0
    world: int = 1
    actors: int = 0
    device: str = "cpu"


def roll_out(config: RolloutRun, prompts: Sequence[Prompt], share: Share) -> list[ClipGroup]:
    """The groups of prompts in order: those that `config.output` has, and the others, made now. Every process of a
    training makes its part (the first one all, in actors) and waits for the others'.

    Raises:
        UserError: models that are not there or do not fit, or storage fails.
    """
    folder, protocol = Folder.at(config.output), open_bundle(config.bundle).protocol(config.reward_text).id()
    single = config.model_copy(update={"unit_clips": 1})
    units = [Unit(f"group-{i:05d}", tracks) for i, (_, tracks) in enumerate(plan_pool(prompts, single).units())]
    groups = {unit.name: _read(folder, unit.name) for unit in units}
    mine = [unit for i, unit in enumerate(units) if (not share.rank if share.actors else i % share.world == share.rank)]
    todo = [unit for unit in mine if groups[unit.name] is None]
    for unit in todo:
        unit.rows = candidates(config, unit, protocol)
    if todo:
        job = RolloutJob(_placed(config, share).model_dump_json(), "", protocol)
        with alone():  # threads and memory of the training are as they were
            for _ in each(partial(whole_worker, job.to_json()), todo, job.pool.runtime):
                pass
    while missing := [name for name, group in groups.items() if group is None]:
        groups |= {name: _read(folder, name) for name in missing}
        if not any(groups[unit.name] is None for unit in mine) and any(groups[name] is None for name in missing):
            time.sleep(POLL_S)  # other processes are at work
        elif lost := [unit.name for unit in mine if groups[unit.name] is None]:
            raise UserError(f"{folder}: {', '.join(lost)} cannot be read after it was written.", "Look at the storage.")
    return [group for group in groups.values() if group is not None]


def _placed(config: RolloutRun, share: Share) -> RolloutRun:
    """The run with the places of its work: this process, or actors with a GPU each where the training has GPUs."""
    where: dict[str, Any] = {"runner": "local", "device": share.device}
    if share.actors:
        gpus = float(share.device != "cpu")
        kind = share.device.partition(":")[0]
        where = {"runner": "ray", "workers": share.actors, "gpus": gpus, "device": kind}
    runtime = config.runtime.model_copy(update=where)
    assert isinstance(runtime, ActorsConfig)
    return config.model_copy(update={"runtime": runtime})


def _file(name: str) -> str:
    return f"{name}.safetensors"


def _read(folder: Folder, name: str) -> ClipGroup | None:
    """A group; None where there is none, or its file is not what was written: it is made again."""
    if not folder.exists(_file(name)):
        return None
    try:
        tensors, about = unpack(folder.read(_file(name)), folder.path(_file(name)))
    except UserError as error:
        console.print(f"{error.message} It is made again.", style="yellow", markup=False)
        return None
    return ClipGroup(about["rows"], tensors)


def round_seed(seed: int, number: int) -> int:
    """Of the noise of a round, so that no round draws what another has drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed} round {number}".encode()).digest()[:7])
