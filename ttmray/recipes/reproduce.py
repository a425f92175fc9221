"""The whole chain from one config (paper III-D): songs in; ranker, three stages, clips, evaluation and one page out.

Steps, in order: world (songs that are composed), corpus, votes (made up, for demos), ranker, rescore (the corpus, by
that ranker), trunk, stage1, pool, stage2, control, unselected, pairs_pool, pairs, stage3, choose-<system> (its score),
generate-<system>, evaluate and tables (`ttmray ablate` about these weights). Each is the job of that
name with its own config, a section of this one, in a folder of its own. What one step makes for another (folders,
weights, rewards) is filled in here, as are the held-out prompts. A section that is left out leaves out its step.

A step is skipped when it was finished with this very config, and the steps that it takes from with theirs; otherwise
its job is started, which goes on where it was. So the same command completes a chain that was killed anywhere. Files
outside of the run folder (songs, votes, weights, reference sets) are only looked at for steps that are to run, all of
them before the first one starts (`recipes/needs.py`). A step whose settings or inputs have changed is refused by its
job, as ever: to make it again, delete its folder and those of the steps after it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ttmray.config import Config, ConfigT, fingerprint, identity
from ttmray.corpus.scores import SCORES
from ttmray.errors import UserError
from ttmray.generation.config import GenerateConfig
from ttmray.generation.filter import BY_CHANCE
from ttmray.generation.pool_worker import CandidatesConfig
from ttmray.models.backbone_weights import check_forward
from ttmray.models.bundle import base_name, open_bundle
from ttmray.models.cross_load import cross_load
from ttmray.recipes.chain import fill, merged, run_chain
from ttmray.recipes.chain_plan import Step
from ttmray.recipes.compose import PROMPTS, WorldConfig, compose_world
from ttmray.recipes.needs import Need, needs_of, plots, problem, text_if_there
from ttmray.recipes.reproduce_config import RANKER, ReproduceConfig, SystemConfig
from ttmray.runs import SUCCESS
from ttmray.storage import Folder, absolute
from ttmray.synth.world import TABLE
from ttmray.training.config import ModelConfig, TrainConfig


def reproduce(
    config: ReproduceConfig, *, first: str | None = None, last: str | None = None, plan_only: bool = False
) -> int:
    """Run, or go on with, the chain; returns the exit code of the first step that does not end well, else 0.

    Args:
        first: step to start with; those before it must be done and are taken as they are.
        last: step to end with.
        plan_only: check all sections and what the steps need, print the steps and what is done, and stop.

    Raises:
        UserError: for everything that the user can mend; all sections, and everything that a step to do needs from
            outside of the run folder, are checked before the first step runs.
    """
    steps = build_steps(config)
    root = Folder.at(config.output)
    return run_chain(root, steps, _fingerprints(config, steps), first=first, last=last, plan_only=plan_only)


def build_steps(config: ReproduceConfig) -> list[Step]:
    """All steps in order, with their sections filled in and checked.

    Raises:
        UserError: a section that is wrong, or needs one that is not there.
    """
    chain = _Chain(config)
    if config.world is not None:
        chain.add_world(config.world)
    chain.add_corpus()
    chain.add_ranker()
    chain.add_rescoring()
    if config.trunk is not None:
        chain.add_trunk(config.trunk)
    chain.add_stage1()
    if config.pool is not None:
        chain.add_pool("pool", config.pool, "stage1")
    if config.stage2 is not None:
        _need(config, "stage2", "pool")
        chain.add_stage2("stage2", config.stage2)
        if config.control:
            chain.add_stage2("control", config.stage2)
        if config.unselected:
            chain.add_stage2("unselected", merged(config.stage2, {"filter": {"rule": BY_CHANCE, "rewards": {}}}))
    parent = "stage2" if config.stage2 is not None else "stage1"
    if config.pairs_pool is not None:
        chain.add_pool("pairs_pool", merged(config.pool or {}, config.pairs_pool), parent)
    if config.pairs is not None:
        _need(config, "pairs", "pairs_pool")
        chain.add_pairs(config.pairs)
    if config.stage3 is not None:
        _need(config, "stage3", "pairs")
        chain.add_stage3(config.stage3, parent)
    systems = config.systems or {stage: SystemConfig.model_validate({"stage": stage}) for stage in chain.weights}
    if config.generate is not None:
        for name, system in systems.items():
            chain.add_system(name, system, config.generate)
    if config.evaluate is not None:
        if any(system.clips is None for system in systems.values()):
            _need(config, "evaluate", "generate")
        chain.add_evaluation(systems, config.evaluate)
    if config.tables is not None:
        chain.add_tables(config.tables)
    return chain.steps


class _Chain:
    """The steps so far, and what they have made for those that follow."""

    def __init__(self, config: ReproduceConfig) -> None:
        self.config, self.root = config, Folder.at(config.output)
        self.path = self.root.path
        self.steps: list[Step] = []
        self.weights: dict[str, str] = {}
        """Trained stage -> its weights file, below the run folder."""
        self.models: dict[str, ModelConfig] = {}
        """Trained stage -> its backbone."""
        self.data: dict[str, Any] = {"sources": [{"corpus": self.path("corpus")}]}
        self.bundle: str = config.bundle
        """Of the steps that make clips: its rewards are those of the training."""
        self.scored_by: list[str] = []
        """Steps that make those rewards, beyond the corpus."""
        self.songs: list[str] = []
        """The step that composes the songs, where one does."""
        self.prompts = config.prompts
        """Of the evaluation."""
        self.start: dict[str, Any] = {}
        """What Stage 1 starts from, as fields of its model."""

    def section(self, kind: type[ConfigT], name: str, fields: Mapping[str, Any], **links: Any) -> ConfigT:
        return fill(kind, name, fields, merged(self.seeds(name), {"bundle": self.bundle, **links}))

    def seeds(self, name: str) -> dict[str, Any]:
        """Seeds of a section that names none; those of the two pools are two."""
        seed = self.config.seed
        if seed is None:
            return {}
        return {"seed": seed + (name == "pairs_pool"), "data": {"seed": seed}, "model": {"seed": seed}}

    def add_world(self, world: WorldConfig) -> None:
        if self.config.seed is not None and "seed" not in world.model_fields_set:
            world = world.model_copy(update={"seed": world.seed + self.config.seed})
        place = self.path("world")
        if world.prompts:
            self.prompts = f"{place}/{PROMPTS}"
        self.add("world", world, lambda: compose_world(world, place), f"world/{TABLE}")
        self.songs = ["world"]

    def add(
        self,
        name: str,
        config: Config,
        run: Callable[[], int],
        *makes: str,
        after: Sequence[str] = (),
        page: str = "",
        section: str = "",
        needs: Sequence[Need] = (),
    ) -> None:
        """Args: section: whose config it is, where that is not called as the step."""
        in_paper = name in ("ranker", "stage1", "pool", "stage2", "pairs_pool", "pairs", "stage3")
        outside = (*needs_of(section or name, config, self.root), *needs)
        self.steps.append(Step(name, config, run, makes, tuple(after), page, in_paper, outside))

    def add_corpus(self) -> None:
        from ttmray.corpus.config import CorpusConfig
        from ttmray.corpus.job import score_corpus

        songs = self.path("world/songs") if self.songs else None
        corpus = self.section(CorpusConfig, "corpus", self.config.corpus, output=self.path("corpus"), input=songs)
        files, page = "corpus/_SUCCESS.json", "corpus/summary.md"
        self.add("corpus", corpus, lambda: score_corpus(corpus), files, after=self.songs, page=page)

    def add_ranker(self) -> None:
        from ttmray.ranker.job import RankerConfig, train_ranker
        from ttmray.synth import votes

        ballot, path, made_up = self.config.votes, self.path, None
        if ballot is not None:
            if self.config.seed is not None and "seed" not in ballot.model_fields_set:
                ballot = ballot.model_copy(update={"seed": self.config.seed})
            draws = [path("corpus"), path("votes.csv"), f"--count={ballot.count}", f"--seed={ballot.seed}"]
            if ballot.listeners is None:
                draws.append(f"--prefer={ballot.prefer}")
            else:
                draws += ballot.listeners.options(path(f"world/{TABLE}"))
            self.add("votes", ballot, lambda: votes.main(draws), "votes.csv", after=["corpus"])
            made_up = [{"name": "votes", "path": path("votes.csv"), "corpus": path("corpus")}]
        if self.config.ranker is None:
            return
        ranker = self.section(RankerConfig, "ranker", self.config.ranker, output=path("ranker"), sources=made_up)
        after = ["votes"] if made_up else []
        files = ("ranker/metrics.json", "ranker/tunejury.safetensors")
        self.add("ranker", ranker, lambda: train_ranker(ranker), *files, after=after, page="ranker/summary.md")

    def add_rescoring(self) -> None:
        """From here on rewards are those of the ranker: of the corpus by a table of scores, of clips by the bundle."""
        from ttmray.corpus.rescore import RescoreConfig, rescore

        if self.config.ranker is None or self.config.reward == "bundle":
            return
        places = {"corpus": self.path("corpus"), "head": self.path(RANKER)}
        rescoring = RescoreConfig(name=RANKER, **places)
        marker, page = f"corpus/{SCORES}/{RANKER}/{SUCCESS}", f"corpus/{SCORES}/{RANKER}/stats.json"
        self.add("rescore", rescoring, lambda: rescore(rescoring), marker, after=["corpus", RANKER], page=page)
        self.data["sources"][0]["score_column"] = f"{RANKER}/instrumental_reward_score"
        self.bundle = f"{base_name(self.config.bundle)}+{places['head']}"
        self.scored_by = ["rescore"]

    def add_trunk(self, fields: Mapping[str, Any]) -> None:
        """Weights without a score, from which every head starts alike."""
        own = open_bundle(base_name(self.config.bundle)).backbone_file()
        start = {} if own is None else {"model": {"init": str(own)}}
        data = merged(self.data, {"sources": [{"score_column": None}]})
        section = merged(self.config.stage1, merged({"model": {"head": "none"}}, fields))
        trunk = self.section(TrainConfig, "trunk", section, output=self.path("trunk"), data=data, **start)
        self.start = {"init": self.path("trunk/weights.safetensors")}
        self.add_training("trunk", trunk, ["corpus"])

    def add_stage1(self) -> None:
        links = {"output": self.path("stage1"), "data": self.data, "model": self.start}
        stage1 = self.section(TrainConfig, "stage1", self.config.stage1, **links)
        self.weights["stage1"], self.models["stage1"] = "stage1/weights.safetensors", stage1.model
        self.add_training("stage1", stage1, ["corpus", *self.scored_by, *(["trunk"] if self.start else [])])

    def add_training(self, name: str, config: TrainConfig, after: Sequence[str]) -> None:
        from ttmray.training.export import export_again
        from ttmray.training.sft import train_sft

        def run() -> int:
            self.check_captions()
            return train_sft(config) or export_again(self.path(name), self.config.weights)

        self.add(name, config, run, f"{name}/_SUCCESS.json", f"{name}/weights.safetensors", after=after)

    def check_captions(self) -> None:
        """Whether the corpus has the prompts of the pools: it is known as soon as the corpus is, days before them.

        Raises:
            UserError: as `choose_prompts`.
        """
        from ttmray.generation.pool import choose_prompts

        for step in self.steps:
            if isinstance(step.config, CandidatesConfig) and not any(map(problem, step.needs)):
                choose_prompts(step.config)

    def candidates(self, kind: type[ConfigT], section: str, fields: Mapping[str, Any], **links: Any) -> ConfigT:
        texts = None if "prompts" in fields else self.path("corpus")
        return self.section(kind, section, fields, corpus=texts, held_out=self.prompts, **links)

    def add_pool(self, name: str, fields: Mapping[str, Any], parent: str) -> None:
        from ttmray.generation.pool import generate_pool

        links = {"output": self.path(name), "checkpoint": self.path(self.weights[parent])}
        pool = self.candidates(CandidatesConfig, name, fields, **links)
        self._check_forward(name, parent, pool)
        after, page = ["corpus", *self.scored_by, parent], f"{name}/summary.md"
        self.add(name, pool, lambda: generate_pool(pool), f"{name}/_SUCCESS.json", after=after, page=page)

    def model(self, parent: str) -> dict[str, Any]:
        """What a stage inherits of the backbone that it starts from."""
        known = self.models[parent]
        inherited = {"size": known.size, "head": known.head, "null": known.null}
        return inherited | {"init": self.path(self.weights[parent])}

    def _check_head(self, name: str, model: ModelConfig, parent: str) -> None:
        """Raises:
        UserError: weights of the stage before would collapse in this one (`models/cross_load.py`).
        """
        cross_load(self.models[parent].head, model.head, f"{name}.model: {parent}", force=model.force_head)

    def _check_forward(self, what: str, stage: str, config: CandidatesConfig | GenerateConfig) -> None:
        """Raises:
        UserError: clips are to be made in a forward, with a null or at a score that the weights of a stage are not for.
        """
        model, score = self.models[stage], config.sampler.score
        how: dict[str, Any] = {"force": config.force_head, "score": score}
        check_forward(f"{what}: {stage}", model.head, model.null, config.head, config.null, **how)

    def add_stage2(self, name: str, fields: Mapping[str, Any]) -> None:
        from ttmray.training.expert_iteration import ExpertIterationConfig, expert_iteration

        control, path = name == "control", self.path
        folder = "unselected" if name == "unselected" else "stage2"
        links: dict[str, Any] = {"output": path(folder), "data": self.data, "model": self.model("stage1")}
        links |= {"weights": self.config.weights, "control": control, "pools": [] if control else [path("pool")]}
        if fields.get("rounds", 1) > 1:  # the later ones need pools of their own
            made_by = {"output": path("pool"), "checkpoint": path(self.weights["stage1"])}
            pool = self.candidates(CandidatesConfig, "pool", self.config.pool or {}, **made_by)
            links["pool"] = pool.model_dump(mode="json")
        stage2 = self.section(ExpertIterationConfig, "stage2", fields, **links)
        self._check_head("stage2", stage2.model, "stage1")
        place, end = f"{folder}/{'control' if control else 'expert'}", "polish" if stage2.polish.steps else "finetune"
        self.weights[name], self.models[name] = f"{place}/round-{stage2.rounds}/{end}.safetensors", stage2.model
        page = "" if control else f"{place}/round-1/selection/selection.md"
        after = ["corpus", *self.scored_by, "stage1", *([] if control else ["pool"])]
        files = (f"{place}/_SUCCESS.json", self.weights[name])
        self.add(name, stage2, lambda: expert_iteration(stage2), *files, after=after, page=page, section="stage2")

    def add_pairs(self, fields: Mapping[str, Any]) -> None:
        from ttmray.training.pairs import PairsConfig, build_pairs

        pairs = self.section(PairsConfig, "pairs", fields, held_out=self.prompts)

        def run() -> int:
            return build_pairs(self.path("pairs_pool"), self.path("pairs"), pairs)

        self.add("pairs", pairs, run, "pairs/pairs.parquet", after=["pairs_pool"], page="pairs/pairs.md")

    def add_stage3(self, fields: Mapping[str, Any], parent: str) -> None:
        from ttmray.training.crpo import CrpoConfig, train_crpo
        from ttmray.training.export import export_again

        place = self.path("stage3")
        links: dict[str, Any] = {"output": place, "pairs": self.path("pairs/pairs.parquet")}
        links |= {"model": self.model(parent)}
        links |= {"data": {"sources": [{"corpus": self.path("pairs_pool"), "split": "all"}]}}
        stage3 = self.section(CrpoConfig, "stage3", fields, **links)
        self._check_head("stage3", stage3.model, parent)
        self.weights["stage3"], self.models["stage3"] = "stage3/weights.safetensors", stage3.model
        files = ("stage3/_SUCCESS.json", self.weights["stage3"])

        def run() -> int:
            return train_crpo(stage3) or export_again(place, self.config.stage3_weights or self.config.weights)

        self.add("stage3", stage3, run, *files, after=["pairs", parent])

    def add_system(self, name: str, system: SystemConfig, fields: Mapping[str, Any]) -> None:
        """The clips of a system, and before them the step that finds out at which of its scores it is best."""
        from ttmray.generation.choose_score import chosen_score
        from ttmray.generation.generate import generate

        if system.clips is not None:
            return
        if system.stage is not None and system.stage not in self.weights:
            raise UserError(f"systems.{name}: there is no {system.stage}.", f"Add the section {system.stage}.")
        weights = self.path(self.weights[system.stage]) if system.stage else absolute(system.checkpoint or "")
        made_by = [system.stage] if system.stage else []
        place, changes = f"generated/{name}", dict(system.generate)
        changes |= {} if system.seed is None else {"seed": system.seed}
        changes = merged(changes, {} if system.score is None else {"sampler": {"score": system.score}})
        links = {"output": self.path(place), "checkpoint": weights, "prompts": self.prompts}
        clips = self.section(GenerateConfig, "generate", merged(fields, changes), **links)
        if system.stage is not None:
            self._check_forward(f"systems.{name}", system.stage, clips)
        choice = f"choices/{name}"
        if system.scores:
            self.add_choice(name, system, clips, made_by)

        def run() -> int:
            if not system.scores:
                return generate(clips)
            best = clips.sampler.model_copy(update={"score": chosen_score(self.path(choice))})
            return generate(clips.model_copy(update={"sampler": best}))

        after = [*self.scored_by, *made_by, *([f"choose-{name}"] if system.scores else [])]
        page, section = f"{place}/index.html", f"systems.{name}" if system.checkpoint else "generate"
        self.add(f"generate-{name}", clips, run, f"{place}/manifest.parquet", after=after, page=page, section=section)

    def add_choice(self, name: str, system: SystemConfig, clips: GenerateConfig, made_by: Sequence[str]) -> None:
        from ttmray.generation.choose_score import CHOICE, ScoreChoiceConfig, choose_score

        place = f"choices/{name}"
        fields = merged(self.config.pool or {}, {"candidates": 1})
        links: dict[str, Any] = {"output": self.path(place), "checkpoint": clips.checkpoint, "bundle": clips.bundle}
        links |= {"head": clips.head, "null": clips.null}
        scores = [] if system.scores == "trained" else list(system.scores)
        choice = self.candidates(ScoreChoiceConfig, "pool", fields, scores=scores, **links)
        if system.stage is not None:
            self._check_forward(f"systems.{name}.scores", system.stage, choice)
        run, after = (lambda: choose_score(choice)), ["corpus", *self.scored_by, *made_by]
        marker, page = f"{place}/{CHOICE}", f"{place}/choice.md"
        self.add(f"choose-{name}", choice, run, marker, after=after, page=page, section="pool")

    def add_evaluation(self, systems: Mapping[str, SystemConfig], fields: Mapping[str, Any]) -> None:
        from ttmray.evaluation.config import EvaluateConfig
        from ttmray.evaluation.evaluate import evaluate
        from ttmray.evaluation.report import report

        places = {name: one.clips or self.path(f"generated/{name}") for name, one in systems.items()}
        links: dict[str, Any] = {"output": self.path("evaluation"), "prompts": self.prompts}
        links |= {"folders": [f"{name}={absolute(place)}" for name, place in places.items()]}
        evaluation = self.section(EvaluateConfig, "evaluate", fields, training=self.path("corpus"), **links)
        files = ("evaluation/_SUCCESS.json", "evaluation/report/index.html")
        after = [*self.scored_by, *(f"generate-{name}" for name, one in systems.items() if one.clips is None)]

        def run() -> int:
            return evaluate(evaluation) or report(evaluation.output)

        self.add("evaluate", evaluation, run, *files, after=after, page=files[1], needs=[plots()])

    def add_tables(self, fields: Mapping[str, Any]) -> None:
        """The ablation job about the weights of this chain. Its cells are steps of its own run folder."""
        from ttmray.recipes.ablations import PAGE, AblateConfig, AblationPlan, ablate

        seeds = self.seeds("tables")
        stage1 = merged(seeds, {"data": self.data, "model": self.start})
        links: dict[str, Any] = {
            "output": self.path("tables"),
            "prompts": self.prompts,
            "weights": self.config.weights,
            "references": {"corpus": self.path("corpus")},
            "stage1": merged({name: stage1[name] for name in ("data", "model")}, self.config.stage1),
            "generate": {name: seed for name, seed in seeds.items() if name == "seed"} | (self.config.generate or {}),
            "evaluate": {"reference": "corpus"},
            "checkpoints": {stage: {"path": self.path(file)} for stage, file in self.weights.items()},
        }
        tables = self.section(AblateConfig, "tables", fields, **links)
        AblationPlan(tables)  # what is wrong with it is said now, and not after days
        files, page = (f"tables/{PAGE}", "tables/cells.json"), f"tables/{PAGE}"
        after = ["corpus", *self.scored_by, *self.weights]
        self.add("tables", tables, lambda: ablate(tables), *files, after=after, page=page, needs=[plots()])


def _from_outside(config: ReproduceConfig, step: str) -> dict[str, str]:
    """Addresses of weights and clips that are not of this chain; their content is the job's to compare."""
    if step == "evaluate":
        return {name: absolute(one.clips) for name, one in config.systems.items() if one.clips}
    kind, _, name = step.partition("-")
    system = config.systems.get(name) if kind in ("choose", "generate") else None
    return {name: absolute(system.checkpoint)} if system is not None and system.checkpoint else {}


def _need(config: ReproduceConfig, section: str, other: str) -> None:
    if getattr(config, other) is None:
        raise UserError(f"section {section} needs section {other}.", f"Add `{other}: {{}}`, or remove {section}.")


def _fingerprints(config: ReproduceConfig, steps: Sequence[Step]) -> dict[str, str]:
    """What a step was finished with: its config, the prompts, and the same of the steps that it takes from."""
    prompts = None if config.prompts is None else text_if_there(config.prompts)
    prints: dict[str, str] = {}
    for step in steps:
        what: dict[str, Any] = {"config": identity(step.config), "after": [prints[name] for name in step.after]}
        if step.name.endswith("pool") or step.name.startswith(("pairs", "choose", "generate", "evaluate")):
            what["prompts"] = prompts
        if step.name in ("trunk", "stage1", "stage3"):
            what["weights"] = (config.stage3_weights if step.name == "stage3" else None) or config.weights
        what |= {"outside": outside} if (outside := _from_outside(config, step.name)) else {}
        prints[step.name] = fingerprint(what)
    return prints
