"""Tuning methods side by side: every one from the same parent, with the same budget, judged on held-out prompts.

Steps, in order: prompts (composed, or of files), reference (what FAD and KAD are against), parent (its weights as a
file), hear-parent; for every seed pool-<seed>, which methods of one round share, and for every method
tune-<method>-<seed> and hear-<method>-<seed>; compare. They are skipped, resumed and paid for as those of every chain.
With one method named, this is how a model is tuned by it: its weights lie in `seed-<n>/<method>/`.

Held equal: the parent, the prompts of a seed, the number of generated clips, and the passes of the training, hence its
FLOPs (`ttmray.recipes.tuning`). Not equal, and therefore in the table: FLOPs of sampling, updates, seconds.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ttmray.config import Config, Location, added, execution, fingerprint, identity
from ttmray.console import meter
from ttmray.errors import EXIT_OK, UserError
from ttmray.evaluation.measure import MeasureConfig
from ttmray.evaluation.reference import STORE, build_reference
from ttmray.evaluation.systems import SYSTEM_NAME
from ttmray.generation.config import GenerateConfig
from ttmray.generation.pool import generate_pool
from ttmray.generation.prompts import Prompt, given_prompts, held_out, read_prompts
from ttmray.generation.sampler import SCORE_LIMIT
from ttmray.json_text import as_read
from ttmray.models.backbone import SIZES, BackboneConfig
from ttmray.models.backbone_weights import file_config, read_support
from ttmray.models.bundle import Bundle, BundleName, base_name, open_bundle
from ttmray.models.loading import LoadOptions
from ttmray.models.weights import weights_file
from ttmray.recipes.chain import fill, merged, run_chain
from ttmray.recipes.chain_plan import Step
from ttmray.recipes.hearing import HEARD, Hearing, OtherRewardConfig, hear
from ttmray.recipes.method_tables import MethodComparison, compare
from ttmray.recipes.needs import Need, file_there, needs_of, plots, text_if_there, weights
from ttmray.recipes.tuning import (
    METHODS,
    BudgetConfig,
    MethodConfig,
    MethodName,
    Parent,
    Tuned,
    Tuning,
    pool_config,
    run_phases,
    write_prompts,
)
from ttmray.storage import Folder
from ttmray.synth.captions import caption
from ttmray.synth.composer import compose
from ttmray.synth.world import clip, write_world
from ttmray.training.rounds import Column
from ttmray.training.sft import SMALL
from ttmray.training.tensors import pack

PARENT, HELD_OUT, PROMPTS = "parent.safetensors", "held_out.csv", "prompts.csv"
REFERENCE = "clean"
"""Name of the reference set that is composed."""
PAGE = "comparison/methods.md"


class ComposedConfig(Config):
    """Prompts and reference by the built-in composer, for bundles that know its music."""

    seed: int = Field(31, ge=0)
    """Of the songs: one that no part of the bundle has seen."""
    prompts: int = Field(256, ge=2)
    """Captions to learn from; every seed draws its own from them."""
    held_out: int = Field(40, ge=2)
    """Captions of other songs, for the evaluation."""
    reference: int = Field(200, ge=2)
    """Clips of yet other songs, without faults, that FAD and KAD are against."""


class CompareMethodsConfig(Config):
    """`jobs/compare_methods.py` and `ttmray compare-methods`."""

    output: Location = execution("runs/methods")
    """Run folder: a local path."""
    bundle: BundleName = "micro"
    """Models of all steps; its reward is what `rewards` speak of."""
    checkpoint: Location | None = execution(None)
    """Parent: weights of the backbone; null: the bundle's."""
    composed: ComposedConfig | None = None
    """Prompts and reference are composed; else `prompts`, `held_out` and, if there is one, `reference` are files."""
    prompts: Location | None = execution(None)
    """File of prompts to learn from."""
    held_out: Location | None = execution(None)
    """File of prompts of the evaluation, none of which may be in the other one."""
    reference: str | None = execution(None)
    """Reference set of FAD and KAD."""
    references: Location = execution(STORE)
    """Folder of reference sets."""
    rewards: dict[Column, float] = Field({"reward_score": 1.0}, min_length=1)
    """Weights of the columns whose sum is what all methods are to raise. Another head is `bundle=micro+HEAD`."""
    reward_text: Literal["empty", "caption"] = "empty"
    """What the reward sees as text."""
    others: dict[str, OtherRewardConfig] = Field(default_factory=dict)
    """Rewards that nothing is trained on."""
    score: Annotated[float, Field(ge=-SCORE_LIMIT, le=SCORE_LIMIT)] | Literal["auto"] | None = "auto"
    """Score that is sampled and trained for, everywhere the same. `auto`: that of the bundle, or of a checkpoint the
    95th percentile of those that it was trained on; null: none."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    """Of sampling and training; a method is done once for each."""
    noise: int = Field(42, ge=0)
    """Seed of the noise of held-out clips, the same for all."""
    budget: BudgetConfig = BudgetConfig()
    methods: dict[str, MethodConfig] = Field(min_length=1)
    """Rows by name; null takes one out again."""
    candidates: dict[str, Any] = Field(default_factory=dict)
    """`ttmray pool`: sampler, gates and places of whatever is sampled, rollouts and held-out clips included. Steps of
    rollouts are those of grpo's own section."""
    train: dict[str, Any] = Field(default_factory=dict)
    """What all trainings share: batch, precision, rates, runtime."""
    measure: MeasureConfig = execution(MeasureConfig())
    """Where and how fast held-out clips are measured."""
    confidence: float = added(0.95, gt=0, lt=1)
    """Of the intervals."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("methods"), dict):
            return values
        return values | {"methods": {name: row for name, row in values["methods"].items() if row is not None}}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        files = self.prompts is not None and self.held_out is not None
        if (self.composed is None) != files or (self.composed is not None and (self.prompts or self.held_out)):
            raise ValueError("needs composed, or both prompts and held_out (files), and not both")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is there twice")
        if not any(self.rewards.values()):
            raise ValueError("rewards: all weights are 0")
        for name, row in self.methods.items():
            if not SYSTEM_NAME.fullmatch(name) or name == "parent":
                raise ValueError(f"methods: {name!r} cannot name a row: use letters, digits, '_', '-' and '.'")
            if row.method is None and name not in METHODS:
                raise ValueError(f"methods.{name}: there is no such method; known: {', '.join(METHODS)}")
        return self

    def method(self, row: str) -> MethodName:
        """What a row is."""
        own = self.methods[row].method
        return own if own is not None else row  # type: ignore[return-value]


def compare_methods(
    config: CompareMethodsConfig, *, first: str | None = None, last: str | None = None, plan_only: bool = False
) -> int:
    """Run, or go on with, all methods and write the comparison; returns the exit code of the first step that does not
    end well, else 0.

    Args:
        first, last: steps to start and end with.
        plan_only: check all, print what every method gets, the steps and what is done, and stop.

    Raises:
        UserError: for everything that the user can mend; all sections are checked before the first step runs.
    """
    root = Folder.at(config.output)
    if root.remote:
        raise UserError(f"output {config.output}: methods are compared in a local folder.", "Name a local path.")
    chain = _MethodChain(config, root)
    return run_chain(
        root, chain.steps, chain.prints, first=first, last=last, plan_only=plan_only, about=list(chain.told())
    )


class _MethodChain:
    """The steps, and what each depends on."""

    def __init__(self, config: CompareMethodsConfig, root: Folder) -> None:
        self.config, self.root, self.bundle = config, root, open_bundle(base_name(config.bundle))
        self.steps: list[Step] = []
        self.prints: dict[str, str] = {}
        self.tuned: dict[tuple[str, int], Tuned] = {}
        """(row, seed) -> what its method gives."""
        self.shape = self._shape()
        self.score = self._score()
        own: dict[str, Any] = {"bundle": config.bundle, "reward_text": config.reward_text}
        self.candidates = merged(own, config.candidates)
        self.hearing = Hearing(config.bundle, config.reward_text, config.others, config.measure)
        self._add_sources()
        self._add_hearing("parent", config.noise, {0.0: self.parent}, ("prompts", *self._parent_step), 1)
        for seed in config.seeds:
            self._add_seed(seed)
        self._add_comparison()

    @property
    def parent(self) -> str:
        return self.config.checkpoint or self.root.path(PARENT)

    @property
    def _parent_step(self) -> tuple[str, ...]:
        return () if self.config.checkpoint else ("parent",)

    def _shape(self) -> BackboneConfig:
        if self.config.checkpoint is not None:
            return file_config(self.config.checkpoint)[0]
        return self.bundle.load(["backbone"], LoadOptions()).backbone.config

    def _score(self) -> float | None:
        """Raises:
        UserError: nothing says which.
        """
        if self.config.score != "auto":
            if self.config.score is not None and self.shape.head == "none":
                raise UserError("score is set, but the parent has no score head.", "Set score=null.")
            return self.config.score
        if self.shape.head == "none":
            return None
        if self.config.checkpoint is None and "score" in self.bundle.sampling:
            return float(self.bundle.sampling["score"])
        support = read_support(weights_file(self.config.checkpoint, "checkpoint")) if self.config.checkpoint else None
        if support is None:
            raise UserError("the parent does not say which scores it was trained on.", "Set score to a number.")
        return round(support.p95, 3)

    def _parent(self) -> Parent:
        """Raises:
        UserError: a backbone of a shape that has no name.
        """
        sizes: dict[str, BackboneConfig] = dict(SMALL) | {str(name): size for name, size in SIZES.items()}
        ours = [getattr(self.shape, name) for name in ("hidden", "heads", "depth", "fused_depth")]
        for name, size in sizes.items():
            same_latents = name in SMALL or size.latent_dim == self.shape.latent_dim
            if [getattr(size, one) for one in ("hidden", "heads", "depth", "fused_depth")] == ours and same_latents:
                return Parent(self.parent, name, self.shape.head, self.shape.null)
        raise UserError(f"no size of backbone has {ours[0]} channels and {ours[2]} blocks.", "See `ttmray params`.")

    def add(self, step: Step, what: Any = None) -> None:
        """A step, whose fingerprint holds its config, those of the steps before it, and `what` else decides it."""
        self.steps.append(step)
        after = [self.prints[name] for name in step.after]
        self.prints[step.name] = fingerprint({"config": identity(step.config), "after": after, "what": what})

    def _add_sources(self) -> None:
        config, root = self.config, self.root
        files = tuple(f"seed-{seed}/{PROMPTS}" for seed in config.seeds)
        what = [config.budget.prompts, list(config.seeds)]
        needs = [Need(file_there, (path,)) for path in (config.prompts, config.held_out) if path is not None]
        texts = [text_if_there(path) for path in (config.prompts, config.held_out) if path is not None]
        source: Config = config.composed or config
        step = Step("prompts", source, partial(_write_prompts, config, root), (HELD_OUT, *files), needs=tuple(needs))
        self.add(step, what + texts)
        if config.composed is not None:
            build, needed = partial(_build_reference, config, self.bundle.clip_s, root), tuple(weights(config.bundle))
            files = (f"references/{REFERENCE}/reference.json",)
            self.add(Step("reference", config.composed, build, files, needs=needed), base_name(config.bundle))
        if config.checkpoint is None:
            taken = partial(_write_parent, self.bundle, root)
            self.add(Step("parent", config.budget, taken, (PARENT,)), base_name(config.bundle))

    def _add_hearing(
        self, row: str, noise: int, taken: Mapping[float, str], after: Sequence[str], samples: int
    ) -> None:
        """The step that makes and measures held-out clips of some weights."""
        name = f"hear-{row}"
        place = self.root.sub(f"heard/{row}")
        sampler = merged({"score": self.score}, self.candidates.get("sampler", {}))
        usual: dict[str, Any] = {"bundle": self.config.bundle, "sampler": sampler, "samples": samples, "seed": noise}
        usual |= {"prompts": self.root.path(HELD_OUT), "format": "flac", "max_failures": 10**6}
        if "runtime" in self.candidates:
            usual["runtime"] = self.candidates["runtime"]
        clips = {
            share: fill(
                GenerateConfig, "candidates", {}, {**usual, "checkpoint": path, "output": place.path(f"clips-{i}")}
            )
            for i, (share, path) in enumerate(taken.items())
        }
        others = {other: identity(one) for other, one in self.config.others.items()}
        what = [[identity(one) for one in clips.values()], others, self.config.reward_text]
        run = partial(hear, clips, place, self.hearing)
        last, needed = list(clips.values())[-1], tuple(weights(self.config.bundle))
        self.add(Step(name, last, run, (f"heard/{row}/{HEARD}",), tuple(after), needs=needed), what)

    def _add_seed(self, seed: int) -> None:
        config, place = self.config, self.root.sub(f"seed-{seed}")
        before = ("prompts", *self._parent_step)
        count = config.composed.held_out if config.composed else _count(config.held_out)
        tunings = {
            row: Tuning(
                row,
                settings,
                self._parent(),
                place.path(PROMPTS),
                count,
                config.rewards,
                config.budget,
                place.path("pool"),
                place.sub(row),
                self.candidates,
                config.train,
                self.score,
                seed,
            )
            for row, settings in config.methods.items()
        }
        tuned = {row: METHODS[config.method(row)](tuning) for row, tuning in tunings.items()}
        pool = f"pool-{seed}"
        if any(one.shares_pool for one in tuned.values()):
            some = next(iter(tunings.values()))
            sampled = pool_config(some, self.parent, some.pool, some.prompts, config.budget.prompts)
            run = partial(generate_pool, sampled)
            marker = f"seed-{seed}/pool/_SUCCESS.json"
            self.add(Step(pool, sampled, run, (marker,), before, page=f"seed-{seed}/pool/summary.md"))
        for row, one in tuned.items():
            self.tuned[row, seed] = one
            name, after = f"{row}-{seed}", (*before, *([pool] if one.shares_pool else []))
            weights_of = {snapshot.share: snapshot.weights for snapshot in one.snapshots}
            if one.phases:
                files = tuple(path.removeprefix(f"{self.root.uri}/") for path in weights_of.values())
                trained, run = one.phases[-1].config, partial(run_phases, one.phases)
                needs = needs_of(f"methods.{row}.train", trained, self.root)
                what = [identity(phase.config) for phase in one.phases]
                self.add(Step(f"tune-{name}", trained, run, files, after, needs=needs), what)
                after = (f"tune-{name}",)
            noise = config.noise + (seed if one.best_of > 1 else 0)
            self._add_hearing(name, noise, weights_of or {0.0: self.parent}, after, one.best_of)

    def _add_comparison(self) -> None:
        config = self.config
        reference = (REFERENCE, self.root.path("references")) if config.composed else None
        if config.reference is not None:
            reference = (config.reference, config.references)
        comparison = MethodComparison(
            root=self.root,
            bundle=config.bundle,
            shape=self.shape,
            parent=self.parent,
            rewards=config.rewards,
            others=tuple(config.others),
            seeds=config.seeds,
            rows={row: config.method(row) for row in config.methods},
            tuned=self.tuned,
            reference=reference,
            confidence=config.confidence,
            equal=self.equal(),
        )
        files = (PAGE, "comparison/methods.json", "comparison/methods.csv", "comparison/clips.csv")
        after = [name for name in self.prints if name.startswith("hear-")] + (["reference"] if config.composed else [])
        run = partial(compare, comparison)
        self.add(
            Step("compare", config.budget, run, files, tuple(after), page=PAGE, needs=(plots(),)),
            [identity(config)["rewards"], config.confidence],
        )

    def equal(self) -> str:
        """What all methods have in common, in words."""
        budget = self.config.budget
        return (
            "Held equal: the parent; in a seed the prompts to learn from; "
            f"{budget.prompts * budget.candidates} generated clips ({budget.prompts} prompts x {budget.candidates}); "
            f"at most {budget.passes:,} passes of a clip forward and backward through the backbone, hence the FLOPs of "
            "training. Held-out prompts and their noise are the same for all, but for the best of N, whose seeds are "
            "draws of candidates. Not equal: FLOPs of sampling, updates, seconds."
        )

    def told(self) -> Iterator[str]:
        """What every method gets."""
        yield self.equal()
        for row in self.config.methods:
            one = self.tuned[row, self.config.seeds[0]]
            what = f"best of {one.best_of}" if one.best_of > 1 else f"{one.updates:,} updates, {one.passes:,.0f} passes"
            yield f"{row:<20} {one.clips:,} clips, {what}"


def _count(path: str | None) -> int:
    """Prompts of a file; 1 where it is missing, which is a need of the first step."""
    assert path is not None
    return len(read_prompts(path)) if text_if_there(path) is not None else 1


def _composed_prompts(config: ComposedConfig, clip_s: float) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from and held-out ones, of different songs and of different words."""

    def texts(first: int, count: int) -> list[str]:
        lines: dict[str, None] = {}
        index = first
        while len(lines) < count:
            piece = compose(config.seed, index)
            rng = np.random.default_rng([config.seed, index])
            lines[caption(piece.heard(0.0, min(clip_s, piece.seconds)), rng)] = None
            index += 1
        return list(lines)

    judged = given_prompts(texts(0, config.held_out))
    with meter("composing prompts", config.prompts):
        more = given_prompts(texts(1_000_000, config.prompts + config.held_out))
    taken = {prompt.id for prompt in held_out(more, judged)}
    return [prompt for prompt in more if prompt.id not in taken][: config.prompts], judged


def _write_prompts(config: CompareMethodsConfig, root: Folder) -> int:
    """The held-out prompts, and for every seed those to learn from."""
    if config.composed is not None:
        learned, judged = _composed_prompts(config.composed, open_bundle(base_name(config.bundle)).clip_s)
    else:
        assert config.prompts is not None
        assert config.held_out is not None
        learned, judged = read_prompts(config.prompts), read_prompts(config.held_out)
        if bad := held_out(learned, judged):
            raise UserError(
                f"{config.prompts}: {len(bad)} prompts are held out by {config.held_out}, e.g. {bad[0].text!r}.",
                "Remove them: who learns from the prompts of the evaluation measures nothing.",
            )
    count = config.budget.prompts
    if len(learned) < count:
        raise UserError(
            f"there are {len(learned)} prompts to learn from, the budget needs {count}.",
            "Add some, or lower budget.clips or raise budget.candidates.",
        )
    write_prompts(root, HELD_OUT, judged)
    for seed in config.seeds:
        chosen = np.random.default_rng(seed).permutation(len(learned))[:count].tolist()
        write_prompts(root.sub(f"seed-{seed}"), PROMPTS, [learned[i] for i in chosen])
    return EXIT_OK


def _build_reference(config: CompareMethodsConfig, clip_s: float, root: Folder) -> int:
    """Clips without faults, and their embeddings as a reference set."""
    composed = config.composed
    assert composed is not None
    place = root.sub("reference")
    if not place.exists("world.parquet"):
        with meter("composing the reference", composed.reference) as progress:

            def clips() -> Any:
                for index in range(composed.reference):
                    yield clip(composed.seed, 2_000_000 + index, clip_s, faults={})
                    progress.advance(1)

            write_world(place.uri, clips(), format="flac")
    where: dict[str, Any] = {
        "store": root.path("references"),
        "bundle": base_name(config.bundle),
        "runtime": config.measure,
    }
    return build_reference(REFERENCE, place.path("songs"), **where)


def _write_parent(bundle: Bundle, root: Folder) -> int:
    """The bundle's backbone as a file of weights."""
    model = bundle.load(["backbone"], LoadOptions()).backbone
    about = {"kind": "ttmray weights", "weights": bundle.name, "backbone": model.config.to_dict()}
    root.write(PARENT, pack(model.state_dict(), as_read(about)))
    return EXIT_OK
