"""One interface for tuning methods: parent, prompts, reward and budget in (`Tuning`), weights and an account out.

A method is a function that builds the configs of the jobs it consists of, which are those that people run by hand
(`ttmray pool`, `filter`, `pairs`, `train-sft`, `train-crpo`, `train-grpo`), all from one budget. So that methods can be
compared, work is counted in two units that they share: clips that are generated to learn from, and *passes*, clips that
go forward and backward through the backbone. A clip of fine-tuning is one pass, a pair of CRPO 2 2/3 (two clips, and
both once more forward through the reference), a drawn step of GRPO 2, one per branch of guidance. Equal passes are
equal training FLOPs, since all methods train the same backbone.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from pydantic import Field

from ttmray.config import Config, ConfigT
from ttmray.errors import EXIT_OK, UserError
from ttmray.generation.filter import KEPT, WEIGHTED, FilterConfig, filter_pool
from ttmray.generation.pool import generate_pool
from ttmray.generation.pool_worker import CandidatesConfig, PoolSampler
from ttmray.generation.prompts import Prompt, read_prompts
from ttmray.models.bundle import open_bundle
from ttmray.models.score_heads import Head, Null
from ttmray.recipes.chain import fill, merged
from ttmray.storage import Folder, split_path
from ttmray.training.checkpoint import step_name
from ttmray.training.config import LoopConfig, TrainConfig
from ttmray.training.crpo import CrpoConfig, train_crpo
from ttmray.training.export import export
from ttmray.training.grpo import GrpoConfig, train_grpo
from ttmray.training.loop import CHECKPOINTS
from ttmray.training.pairs import PAIRS, PairsConfig, build_pairs
from ttmray.training.rounds import Column
from ttmray.training.sft import train_sft

MethodName = Literal["best-of-n", "unselected", "reward-weighted", "expert-iteration", "crpo", "domination", "grpo"]
BRANCHES = 2
"""Forwards of a step of the sampler: with and without the prompt."""
PAIR = 2 + 2 / 3
"""Passes of a pair of CRPO: two clips, and both forward through the reference."""


class BudgetConfig(Config):
    """What every method gets."""

    clips: int = Field(384, ge=2)
    """Clips that are generated to learn from; best-of-n spends them on the held-out prompts themselves."""
    candidates: int = Field(8, ge=2)
    """Of a prompt, so that there are `clips / candidates` prompts."""
    passes: int = Field(3072, ge=1)
    """Clips forward and backward through the backbone. A pair of CRPO counts 2 2/3, a drawn step of GRPO 2."""
    snapshots: int = Field(2, ge=1)
    """Weights along a training that are judged, at equal distances; the last are those of the end."""

    @property
    def prompts(self) -> int:
        """Prompts of the clips."""
        return self.clips // self.candidates


class MethodConfig(Config):
    """A row of the comparison: a method, and what of it is not as usual."""

    method: MethodName | None = None
    """null: the name of the row is that of its method."""
    rounds: int | None = Field(None, ge=1)
    """Rounds of sampling and training, each with its share of the budget and prompts of its own: of expert-iteration
    (default 1) and grpo (default 4)."""
    filter: dict[str, Any] = Field(default_factory=dict)
    """`ttmray filter`: what expert-iteration keeps, and how reward-weighted weighs."""
    pairs: dict[str, Any] = Field(default_factory=dict)
    """`ttmray pairs`, of crpo and domination."""
    train: dict[str, Any] = Field(default_factory=dict)
    """The job that trains: `train-sft`, `train-crpo` or `train-grpo`."""


class Parent(NamedTuple):
    """Weights that methods start from: their file, and what a training must know of them."""

    weights: str
    size: str
    head: Head
    null: Null


@dataclass(frozen=True)
class Tuning:
    """What a method is given.

    Attributes:
        name: of its row, for messages.
        parent: weights to start from.
        prompts: file of the prompts that it may use, as many as the budget has.
        held_out: number of the prompts of the evaluation.
        rewards: columns and weights, whose sum is the reward.
        pool: folder of a pool of all clips of the budget from the parent, which methods of one round share.
        folder: its own.
        candidates: settings of `ttmray pool` for whatever is sampled: bundle, sampler, gates.
        train: settings that all trainings share.
        score: what is sampled and trained for; None: no score.
        seed: of the noise and of the order of the training.
    """

    name: str
    settings: MethodConfig
    parent: Parent
    prompts: str
    held_out: int
    rewards: Mapping[Column, float]
    budget: BudgetConfig
    pool: str
    folder: Folder
    candidates: Mapping[str, Any]
    train: Mapping[str, Any]
    score: float | None
    seed: int

    def section(self, kind: type[ConfigT], part: str, own: Mapping[str, Any], **links: Any) -> ConfigT:
        """A job's config: what is filled in, and over it what the row says."""
        return fill(kind, f"methods.{self.name}.{part}", own, links)

    def training(self, kind: type[LoopConfig], output: str, **links: Any) -> dict[str, Any]:
        """What is filled into a training of this kind: the shared settings that it knows, and `links`."""
        shared = {name: value for name, value in self.train.items() if name in kind.model_fields}
        return merged(merged({"output": output, "ema": {"sigma_rels": [0.05]}}, shared), links)

    def batch(self, kind: type[LoopConfig]) -> int:
        """Samples of an update of a training of this kind."""
        own = self.settings.train.get("batch", self.train.get("batch", kind.model_fields["batch"].default))
        return int(own)

    def model(self, init: str) -> dict[str, Any]:
        return {"size": self.parent.size, "head": self.parent.head, "null": self.parent.null, "init": init}

    def source(self, pool: str, keys: str | None = None) -> dict[str, Any]:
        """Clips of a pool, conditioned on the score that they were sampled at, which is that of the evaluation."""
        column = None if self.score is None else "input_score"
        return {"corpus": pool, "split": "all", "keys": keys, "score_column": column}


class Phase(NamedTuple):
    """A job of a method; it goes on where it was and returns its exit code."""

    config: Config
    run: Callable[[], int]


class Snapshot(NamedTuple):
    """Weights after a share of the budget."""

    share: float
    weights: str


@dataclass(frozen=True)
class Tuned:
    """What a method gives.

    Attributes:
        phases: its jobs in order.
        snapshots: its weights, the last ones those of the end; none where it trains nothing.
        clips: generated to learn from, or to choose from.
        forwards: passes of a clip forward through the backbone in sampling them.
        updates, passes: of the training.
        best_of: clips per held-out prompt, of which the best is taken.
        shares_pool: whether its clips are those of the common pool.
    """

    phases: tuple[Phase, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    clips: int = 0
    forwards: int = 0
    updates: int = 0
    passes: float = 0.0
    best_of: int = 1
    shares_pool: bool = False


def pool_config(tuning: Tuning, weights: str, output: str, prompts: str, count: int) -> CandidatesConfig:
    """Candidates of the first `count` prompts of a file."""
    links = merged({"sampler": {"score": tuning.score}}, tuning.candidates)
    links |= {"checkpoint": weights, "output": output, "prompts": prompts, "prompt_count": count}
    links |= {"candidates": tuning.budget.candidates, "seed": tuning.seed, "max_failures": tuning.budget.clips}
    return fill(CandidatesConfig, "candidates", {}, links)


def write_prompts(path: Folder, name: str, prompts: list[Prompt]) -> None:
    """A table of prompts with their ids."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("id", "prompt"))
    table.writerows((prompt.id, prompt.text) for prompt in prompts)
    path.write(name, text.getvalue().encode())


def best_of_n(tuning: Tuning) -> Tuned:
    """No training: of N clips per held-out prompt the best by the reward, N by the budget of clips."""
    n = max(2, tuning.budget.clips // tuning.held_out)
    return Tuned(best_of=n, clips=n * tuning.held_out, forwards=_forwards(tuning, n * tuning.held_out))


def unselected(tuning: Tuning) -> Tuned:
    """Fine-tuning on all clips of the pool alike: what the other methods gain beyond it is the reward's doing."""
    return _fine_tuned(tuning, None)


def reward_weighted(tuning: Tuning) -> Tuned:
    """Fine-tuning on all clips of the pool, with losses weighted by exp(z / temperature) of the reward."""
    return _fine_tuned(tuning, merged({"temperature": 1.0}, tuning.settings.filter))


def expert_iteration(tuning: Tuning) -> Tuned:
    """Fine-tuning on the best clips of the pool, in one round or in several with pools of their own."""
    return _fine_tuned(tuning, merged({"share": 0.25}, tuning.settings.filter))


def _fine_tuned(tuning: Tuning, chosen: Mapping[str, Any] | None) -> Tuned:
    """Rounds of pool, selection and Stage 1's training on it.

    Args:
        chosen: what is kept of a pool; None: all of it.
    """
    budget, rounds = tuning.budget, tuning.settings.rounds or 1
    per_round = budget.prompts // rounds
    if not per_round:
        raise UserError(f"methods.{tuning.name}: {budget.prompts} prompts for {rounds} rounds.", "Set fewer rounds.")
    batch = tuning.batch(TrainConfig)
    marks = budget.snapshots if rounds == 1 else 1
    updates = _updates(tuning, batch, 1.0, rounds * marks) // rounds
    phases: list[Phase] = []
    snapshots: list[Snapshot] = []
    weights = tuning.parent.weights
    for number in range(rounds):
        place, pool = tuning.folder.sub(f"round-{number + 1}"), tuning.pool
        if rounds > 1:
            pool = place.path("pool")
            prompts = place.path("prompts.csv")
            config = pool_config(tuning, weights, pool, prompts, per_round)
            share = partial(_share_of_prompts, tuning.prompts, place, number * per_round, per_round)
            phases += [Phase(config, share), Phase(config, partial(generate_pool, config))]
        keys = None
        if chosen is not None:
            gates = {"max_silence": None, "max_clipping": None, "max_similarity": None}
            section = merged({**gates, "rewards": dict(tuning.rewards)}, chosen)
            selecting = tuning.section(FilterConfig, "filter", section)
            selection = place.path("selection")
            phases.append(Phase(selecting, partial(filter_pool, pool, selection, selecting)))
            keys = f"{selection}/{KEPT if selecting.temperature is None else WEIGHTED}"
        run = place.path("training")
        links = tuning.training(
            TrainConfig,
            run,
            **_schedule(updates, updates // marks),
            model=tuning.model(weights),
            validation={"clips": 0},
            data={"sources": [tuning.source(pool, keys)], "seed": tuning.seed},
        )
        training = tuning.section(TrainConfig, "train", tuning.settings.train, **links)
        phases.append(Phase(training, partial(train_sft, training)))
        exports, taken = _exports(training, place, [updates * mark // marks for mark in range(1, marks + 1)], updates)
        phases += exports
        snapshots += [Snapshot((number + share) / rounds, weights) for share, weights in taken]
        weights = taken[-1].weights
    clips = rounds * per_round * budget.candidates
    total, forwards = rounds * updates, _forwards(tuning, clips)
    return Tuned(tuple(phases), tuple(snapshots), clips, forwards, total, float(total * batch), shares_pool=rounds == 1)


def _share_of_prompts(source: str, place: Folder, first: int, count: int) -> int:
    """A round's part of the prompts, as a file of its own."""
    write_prompts(place, "prompts.csv", read_prompts(source)[first : first + count])
    return EXIT_OK


def _forwards(tuning: Tuning, clips: int) -> int:
    """Passes forward through the backbone in sampling clips as a pool does."""
    sampling = pool_config(tuning, tuning.parent.weights, tuning.pool, tuning.prompts, 1).sampler
    return clips * sampling.steps * BRANCHES


def crpo(tuning: Tuning) -> Tuned:
    """DPO for flow matching on winner and loser of a prompt by the reward, with the winner's own loss (Stage 3)."""
    return _on_pairs(tuning, {})


def domination(tuning: Tuning) -> Tuned:
    """The same on pairs whose winner is better in the reward and in the CLAP score (MR-FlowDPO)."""
    return _on_pairs(tuning, {"dominate": {**dict.fromkeys(tuning.rewards, 0.0), "clap_score": 0.0}})


def _on_pairs(tuning: Tuning, rule: Mapping[str, Any]) -> Tuned:
    budget, place = tuning.budget, tuning.folder
    usual = {"by": "rewards", "rewards": dict(tuning.rewards), "per_prompt": max(1, budget.candidates // 2), **rule}
    pairing = tuning.section(PairsConfig, "pairs", merged(usual, tuning.settings.pairs))
    batch = tuning.batch(CrpoConfig)
    updates = _updates(tuning, batch, PAIR, budget.snapshots)
    run, pairs = place.path("training"), place.path("pairs")
    links = tuning.training(
        CrpoConfig,
        run,
        **_schedule(updates, updates // budget.snapshots),
        model=tuning.model(tuning.parent.weights),
        pairs=f"{pairs}/{PAIRS}",
        gradients_every=0,
        data={"sources": [tuning.source(tuning.pool)], "seed": tuning.seed},
    )
    training = tuning.section(CrpoConfig, "train", tuning.settings.train, **links)
    phases = (
        Phase(pairing, partial(build_pairs, tuning.pool, pairs, pairing)),
        Phase(training, partial(train_crpo, training)),
    )
    ends = [updates * mark // budget.snapshots for mark in range(1, budget.snapshots + 1)]
    exports, snapshots = _exports(training, place, ends, updates)
    clips = budget.prompts * budget.candidates
    work = (clips, _forwards(tuning, clips), updates, updates * batch * PAIR)
    return Tuned((*phases, *exports), snapshots, *work, shares_pool=True)


def grpo(tuning: Tuning) -> Tuned:
    """Online GRPO: in rounds, groups of clips are drawn by the weights as they are, and a policy gradient follows.

    Raises:
        UserError: more rounds than prompts.
    """
    budget, place, rounds = tuning.budget, tuning.folder, tuning.settings.rounds or 4
    per_round = budget.prompts // rounds
    if not per_round:
        raise UserError(f"methods.{tuning.name}: {budget.prompts} prompts for {rounds} rounds.", "Set fewer rounds.")
    batch = tuning.batch(GrpoConfig)
    updates = _updates(tuning, batch, float(BRANCHES), rounds) // rounds
    total, run = rounds * updates, place.path("training")
    shared = {name: value for name, value in tuning.candidates.items() if name != "sampler"}
    own = tuning.candidates.get("sampler", {})
    # guidance as in the clips that all other methods learn from; steps are a rollout's own
    bundle = open_bundle(str(tuning.candidates["bundle"]))
    guided = {"weight": PoolSampler().weight, **bundle.sampling, **own}["weight"]
    sampler = {name: value for name, value in own.items() if name != "steps"} | {"weight": guided}
    rollouts = {**shared, "checkpoint": tuning.parent.weights, "prompts": tuning.prompts, "seed": tuning.seed}
    rollouts |= {"candidates": budget.candidates, "prompt_count": rounds * per_round}
    rollouts |= {"sampler": {**sampler, "score": tuning.score}}
    links = tuning.training(
        GrpoConfig,
        run,
        **_schedule(total, updates),
        rewards=dict(tuning.rewards),
        prompts_per_round=per_round,
        updates=updates,
        rollouts=rollouts,
    )
    training = tuning.section(GrpoConfig, "train", tuning.settings.train, **links)
    marks = min(budget.snapshots, rounds)
    ends = [round(rounds * mark / marks) * updates for mark in range(1, marks + 1)]
    exports, snapshots = _exports(training, place, ends, total)
    clips = rounds * per_round * budget.candidates
    forwards = 2 * clips * training.rollouts.sampler.steps * BRANCHES  # the parent's means are made, too
    phases = (Phase(training, partial(train_grpo, training)), *exports)
    return Tuned(phases, snapshots, clips, forwards, total, float(total * batch * BRANCHES))


def _updates(tuning: Tuning, batch: int, passes: float, parts: int) -> int:
    """Updates that the budget allows, in `parts` equal ones.

    Args:
        passes: of a sample.
    """
    updates = int(tuning.budget.passes / (batch * passes) / parts) * parts
    if not updates:
        raise UserError(
            f"methods.{tuning.name}: budget.passes ({tuning.budget.passes}) allow fewer than {parts} updates of "
            f"{batch} samples with {passes:.3g} passes each.",
            "Raise budget.passes, or set a smaller train.batch, fewer snapshots or rounds.",
        )
    return updates


def _schedule(updates: int, every: int) -> dict[str, Any]:
    """Length of a training, and checkpoints that stay."""
    return {"steps": updates, "checkpoint": {"every": every, "keep_every": every}}


def _exports(
    training: LoopConfig, place: Folder, ends: Sequence[int], updates: int
) -> tuple[list[Phase], tuple[Snapshot, ...]]:
    """The weights after some updates of a training as files, and which share of the budget they had."""
    names = [place.path(f"weights-{mark}.safetensors") for mark in range(1, len(ends) + 1)]
    both = list(zip(ends, names, strict=True))
    phases = [Phase(training, partial(_export, training.output, step, name)) for step, name in both]
    return phases, tuple(Snapshot(step / updates, name) for step, name in both)


def _export(run: str, step: int, out: str) -> int:
    folder, name = split_path(out)
    if folder.exists(name):
        return EXIT_OK
    return export(f"{run}/{CHECKPOINTS}/{step_name(step)}", out)


METHODS: dict[MethodName, Callable[[Tuning], Tuned]] = {
    "best-of-n": best_of_n,
    "unselected": unselected,
    "reward-weighted": reward_weighted,
    "expert-iteration": expert_iteration,
    "crpo": crpo,
    "domination": domination,
    "grpo": grpo,
}
"""Name -> what builds it; the docstring's first line says what it is."""


def run_phases(phases: tuple[Phase, ...]) -> int:
    """Run, or go on with, the jobs of a method; returns the exit code of the first that does not end well, else 0."""
    for phase in phases:
        code = phase.run()
        if code != EXIT_OK:
            return code
    return EXIT_OK
