"""The whole chain from one config (paper III-D): songs in; ranker, three stages, clips, evaluation and one page out.

Steps, in order: corpus, votes (made up, for demos), ranker, stage1, pool, stage2, control, pairs_pool, pairs, stage3,
choose-<system> (its score), generate-<system> and evaluate. Each is the job of that name with its own config, a section
of this one, in a folder of its own. What one step makes for another (folders, weights) is filled in here, as are the
held-out prompts. A section that is left out leaves out its step.

A step is skipped when it was finished with this very config, and the steps that it takes from with theirs; otherwise
its job is started, which goes on where it was. So the same command completes a chain that was killed anywhere. Files
outside of the run folder (songs, votes) are only looked at by steps that run. A step whose settings or inputs have
changed is refused by its job, as ever: to make it again, delete its folder and those of the steps after it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ttmray.chain import Step, fill, merged, run_chain
from ttmray.config import Address, Config, ConfigT, execution, fingerprint, identity
from ttmray.errors import UserError
from ttmray.models.bundle import BundleName
from ttmray.storage import Folder, absolute, read_file

Stage = Literal["stage1", "stage2", "control", "stage3"]


class VotesConfig(Config):
    """Made-up votes that follow the rewards of the corpus: for demos."""

    count: int = Field(400, ge=1)
    """Votes."""
    seed: int = 0
    """Of the draws."""


class SystemConfig(Config):
    """Clips of one model for the evaluation."""

    stage: Stage
    """Whose weights."""
    score: float | None = None
    """Score to generate for, in place of the section's."""
    scores: tuple[float, ...] = ()
    """Scores of which the one with the highest mean reward is taken, on one candidate for each prompt of the section
    `pool`, none of which is a prompt of the evaluation: a parent is to be judged at its own best score as well."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.scores and (self.score is not None or len(self.scores) < 2):
            raise ValueError("scores are two or more to choose from, and then there is no score")
        return self


class ReproduceConfig(Config):
    """`jobs/reproduce.py` and `ttmray reproduce`. The sections are configs of the jobs without what the chain fills in:
    outputs, checkpoints, pools, pairs, corpora and prompts."""

    output: Address = execution("runs/reproduce", min_length=1)
    """Run folder: a local path or s3:// prefix."""
    bundle: BundleName = "debug"
    """Models of all steps."""
    prompts: str | None = execution(None)
    """File of the prompts of the evaluation. Pools and pairs must not use them."""
    weights: str = Field("raw", pattern=r"^(raw|ema:[0-9.]+)$")
    """Weights that go from stage to stage: `raw` as in the released chain, or `ema:0.05`."""
    corpus: dict[str, Any]
    """`score-corpus`."""
    votes: VotesConfig | None = None
    """For demos: the ranker learns from made-up votes about the corpus."""
    ranker: dict[str, Any] | None = None
    """`train-ranker`. The rewards of the corpus are those of the bundle, not of this ranker."""
    stage1: dict[str, Any]
    """`train-sft`."""
    pool: dict[str, Any] | None = None
    """`pool`: candidates of Stage 1 for Stage 2. Without `prompts` their texts are captions of the corpus."""
    stage2: dict[str, Any] | None = None
    """`expert-iteration`; its first round has the pool above."""
    control: bool = True
    """Stage 2 once more without its own clips, so that the gain can be attributed."""
    pairs_pool: dict[str, Any] | None = None
    """What differs from `pool` for the candidates of Stage 2 that the pairs are made of; null: there are no pairs."""
    pairs: dict[str, Any] | None = None
    """`pairs`."""
    stage3: dict[str, Any] | None = None
    """`train-crpo`."""
    generate: dict[str, Any] | None = None
    """`generate`, for each system."""
    systems: dict[str, SystemConfig] = Field(default_factory=dict)
    """What is generated and evaluated, by name; default: every trained stage."""
    evaluate: dict[str, Any] | None = None
    """`evaluate`, of all systems."""


def reproduce(
    config: ReproduceConfig, *, first: str | None = None, last: str | None = None, plan_only: bool = False
) -> int:
    """Run, or go on with, the chain; returns the exit code of the first step that does not end well, else 0.

    Args:
        first: step to start with; those before it must be done and are taken as they are.
        last: step to end with.
        plan_only: check all sections, print the steps and what is done, and stop.

    Raises:
        UserError: for everything that the user can mend; all sections are checked before the first step runs.
    """
    if config.prompts is not None:
        config = config.model_copy(update={"prompts": absolute(config.prompts)})
    steps = build_steps(config)
    root = Folder.at(config.output)
    return run_chain(root, steps, _fingerprints(config, steps), first=first, last=last, plan_only=plan_only)


def build_steps(config: ReproduceConfig) -> list[Step]:
    """All steps in order, with their sections filled in and checked.

    Raises:
        UserError: a section that is wrong, or needs one that is not there.
    """
    from ttmray.corpus.config import CorpusConfig
    from ttmray.corpus.job import score_corpus
    from ttmray.evaluation.evaluate import EvaluateConfig, evaluate
    from ttmray.evaluation.report import report
    from ttmray.generation.choose_score import CHOICE, ScoreChoiceConfig, choose_score, chosen_score
    from ttmray.generation.config import GenerateConfig
    from ttmray.generation.generate import generate
    from ttmray.generation.pool import generate_pool
    from ttmray.generation.pool_worker import CandidatesConfig
    from ttmray.synth import votes
    from ttmray.training.config import TrainConfig, with_absolute_paths
    from ttmray.training.crpo import CrpoConfig, train_crpo
    from ttmray.training.expert_iteration import ExpertIterationConfig, expert_iteration
    from ttmray.training.export import export_again
    from ttmray.training.preference_pairs import PairsConfig, build_pairs
    from ttmray.training.ranker_job import RankerConfig, train_ranker
    from ttmray.training.sft import train_sft

    root = Folder.at(config.output)
    path = root.path
    steps: list[Step] = []
    links: dict[str, Any]
    weights: dict[str, str] = {}
    """Trained stage -> its weights file, below the run folder."""

    def section(kind: type[ConfigT], name: str, given: Mapping[str, Any], **links: Any) -> ConfigT:
        return fill(kind, name, given, {"bundle": config.bundle, **links})

    def add(
        name: str, config: Config, run: Callable[[], int], *makes: str, after: Sequence[str] = (), page: str = ""
    ) -> None:
        in_paper = name in ("ranker", "stage1", "pool", "stage2", "pairs_pool", "pairs", "stage3")
        steps.append(Step(name, config, run, makes, tuple(after), page, in_paper))

    corpus = section(CorpusConfig, "corpus", config.corpus, output=path("corpus"))
    corpus = corpus.model_copy(update={"input": absolute(corpus.input)})
    add("corpus", corpus, lambda: score_corpus(corpus), "corpus/_SUCCESS.json", page="corpus/summary.md")

    if config.votes is not None:
        draws = [path("corpus"), path("votes.csv"), f"--count={config.votes.count}", f"--seed={config.votes.seed}"]
        add("votes", config.votes, lambda: votes.main(draws), "votes.csv", after=["corpus"])
    if config.ranker is not None:
        made_up = {"name": "votes", "path": path("votes.csv"), "corpus": path("corpus")} if config.votes else None
        ranker = section(
            RankerConfig, "ranker", config.ranker, output=path("ranker"), sources=[made_up] if made_up else None
        )
        after = ["votes"] if config.votes else []
        made = ("ranker/metrics.json", "ranker/tunejury.safetensors")
        add("ranker", ranker, lambda: train_ranker(ranker), *made, after=after, page="ranker/summary.md")

    data = {"sources": [{"corpus": path("corpus")}]}
    stage1 = with_absolute_paths(section(TrainConfig, "stage1", config.stage1, output=path("stage1"), data=data))
    weights["stage1"] = "stage1/weights.safetensors"
    add(
        "stage1",
        stage1,
        lambda: train_sft(stage1) or export_again(path("stage1"), config.weights),
        "stage1/_SUCCESS.json",
        weights["stage1"],
        after=["corpus"],
    )

    def candidates(name: str, given: dict[str, Any], parent: str) -> CandidatesConfig:
        texts = None if "prompts" in given else path("corpus")
        made_by = {"output": path(name), "checkpoint": path(weights[parent])}
        return section(CandidatesConfig, name, given, corpus=texts, held_out=config.prompts, **made_by)

    def add_pool(name: str, pool: CandidatesConfig, parent: str) -> None:
        after = ["corpus", parent]
        add(name, pool, lambda: generate_pool(pool), f"{name}/_SUCCESS.json", after=after, page=f"{name}/summary.md")

    if config.pool is not None:
        add_pool("pool", candidates("pool", config.pool, "stage1"), "stage1")

    def add_stage2(name: str, given: dict[str, Any]) -> None:
        control = name == "control"
        links: dict[str, Any] = {"output": path("stage2"), "data": data, "model": {"init": path(weights["stage1"])}}
        links |= {"weights": config.weights, "control": control, "pools": [] if control else [path("pool")]}
        if given.get("rounds", 1) > 1:  # the later ones need pools of their own
            links["pool"] = candidates("pool", config.pool or {}, "stage1").model_dump(mode="json")
        stage2 = section(ExpertIterationConfig, "stage2", given, **links)
        place, end = f"stage2/{'control' if control else 'expert'}", "polish" if stage2.polish.steps else "finetune"
        weights[name] = f"{place}/round-{stage2.rounds}/{end}.safetensors"
        page = "" if control else f"{place}/round-1/selection/selection.md"
        after = ["corpus", "stage1"] if control else ["corpus", "stage1", "pool"]
        made = (f"{place}/_SUCCESS.json", weights[name])
        add(name, stage2, lambda: expert_iteration(stage2), *made, after=after, page=page)

    if config.stage2 is not None:
        _need(config, "stage2", "pool")
        add_stage2("stage2", config.stage2)
        if config.control:
            add_stage2("control", config.stage2)
    parent = "stage2" if "stage2" in weights else "stage1"
    if config.pairs_pool is not None:
        given = merged(config.pool or {}, config.pairs_pool)
        add_pool("pairs_pool", candidates("pairs_pool", given, parent), parent)
    if config.pairs is not None:
        _need(config, "pairs", "pairs_pool")
        pairs = section(PairsConfig, "pairs", config.pairs, held_out=config.prompts)
        add(
            "pairs",
            pairs,
            lambda: build_pairs(path("pairs_pool"), path("pairs"), pairs),
            "pairs/pairs.parquet",
            after=["pairs_pool"],
            page="pairs/pairs.md",
        )
    if config.stage3 is not None:
        _need(config, "stage3", "pairs")
        pool_data = {"sources": [{"corpus": path("pairs_pool"), "split": "all"}]}
        links = {"pairs": path("pairs/pairs.parquet"), "model": {"init": path(weights[parent])}, "data": pool_data}
        stage3 = section(CrpoConfig, "stage3", config.stage3, output=path("stage3"), **links)
        weights["stage3"] = "stage3/weights.safetensors"
        add(
            "stage3",
            stage3,
            lambda: train_crpo(stage3) or export_again(path("stage3"), config.weights),
            "stage3/_SUCCESS.json",
            weights["stage3"],
            after=["pairs", parent],
        )

    def add_choice(name: str, system: SystemConfig) -> None:
        """The step that finds out at which of its scores a system is best."""
        given = merged(config.pool or {}, {"candidates": 1})
        links: dict[str, Any] = {"output": path(f"choices/{name}"), "checkpoint": path(weights[system.stage])}
        links |= {"corpus": None if "prompts" in given else path("corpus"), "held_out": config.prompts}
        choice = section(ScoreChoiceConfig, "pool", given, scores=list(system.scores), **links)
        made, after = f"choices/{name}/{CHOICE}", ["corpus", system.stage]
        page = f"choices/{name}/choice.md"
        add(f"choose-{name}", choice, lambda: choose_score(choice), made, after=after, page=page)

    def add_system(name: str, system: SystemConfig, given: dict[str, Any]) -> None:
        if system.stage not in weights:
            raise UserError(f"systems.{name}: there is no {system.stage}.", f"Add the section {system.stage}.")
        if system.scores:
            add_choice(name, system)
        place = f"generated/{name}"
        given = merged(given, {} if system.score is None else {"sampler": {"score": system.score}})
        links = {"checkpoint": path(weights[system.stage]), "prompts": config.prompts}
        clips = section(GenerateConfig, "generate", given, output=path(place), **links)

        def run() -> int:
            if not system.scores:
                return generate(clips, play_page=True)
            best = clips.sampler.model_copy(update={"score": chosen_score(path(f"choices/{name}"))})
            return generate(clips.model_copy(update={"sampler": best}), play_page=True)

        after = [system.stage, *([f"choose-{name}"] if system.scores else [])]
        add(f"generate-{name}", clips, run, f"{place}/manifest.parquet", after=after, page=f"{place}/index.html")

    systems = config.systems or {stage: SystemConfig.model_validate({"stage": stage}) for stage in weights}
    if config.generate is not None:
        for name, system in systems.items():
            add_system(name, system, config.generate)
    if config.evaluate is not None:
        _need(config, "evaluate", "generate")
        folders = [f"{name}={path(f'generated/{name}')}" for name in systems]
        links = {"output": path("evaluation"), "folders": folders, "prompts": config.prompts}
        evaluation = section(EvaluateConfig, "evaluate", config.evaluate, training=path("corpus"), **links)
        made = ("evaluation/_SUCCESS.json", "evaluation/report/index.html")
        after = [f"generate-{name}" for name in systems]
        add(
            "evaluate",
            evaluation,
            lambda: evaluate(evaluation) or report(evaluation.output),
            *made,
            after=after,
            page=made[1],
        )
    return steps


def _need(config: ReproduceConfig, section: str, other: str) -> None:
    if getattr(config, other) is None:
        raise UserError(f"section {section} needs section {other}.", f"Add `{other}: {{}}`, or remove {section}.")


def _fingerprints(config: ReproduceConfig, steps: Sequence[Step]) -> dict[str, str]:
    """What a step was finished with: its config, the prompts, and the same of the steps that it takes from."""
    prompts = None if config.prompts is None else read_file(config.prompts).decode("utf-8", "replace")
    prints: dict[str, str] = {}
    for step in steps:
        what: dict[str, Any] = {"config": identity(step.config), "after": [prints[name] for name in step.after]}
        if step.name.endswith("pool") or step.name.startswith(("pairs", "choose", "generate", "evaluate")):
            what["prompts"] = prompts
        if step.name in ("stage1", "stage3"):
            what["weights"] = config.weights
        prints[step.name] = fingerprint(what)
    return prints
