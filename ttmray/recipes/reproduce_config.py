"""The config of the chain: what `jobs/reproduce.py` runs."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ttmray.config import Config, Location, added, execution
from ttmray.corpus.scores import COLUMN
from ttmray.evaluation.systems import SYSTEM_NAME
from ttmray.models.bundle import DEFAULT, BundleName
from ttmray.recipes.compose import WorldConfig
from ttmray.synth.listeners import Listeners

Stage = Literal["stage1", "stage2", "control", "unselected", "stage3"]
RANKER = "ranker"
"""Step, its folder, and the table of the corpus's scores by it."""


class ListenersConfig(Config):
    """Simulated listeners who know the true quality of synthetic songs (`ttmray.synth.listeners`)."""

    vocal_bias: float = Listeners.vocal_bias
    """Worth that singing adds, in units of quality."""
    certainty: float = Field(Listeners.certainty, gt=0)
    """Slope of a choice per unit of worth."""
    tie_width: float = Field(Listeners.tie_width, ge=0)
    """Difference of worth below which they cannot choose."""
    lapse: float = Field(Listeners.lapse, ge=0, le=1)
    """Share of votes that are thrown at random."""
    clips: Literal["held_out", "all"] = "held_out"
    """What they hear: the clips of the validation and test splits, so that the rewards of the training clips are
    guesses about songs that the ranker has not seen, or all."""

    def options(self, table: str) -> list[str]:
        """Of `ttmray.synth.votes`, about the songs of a world's table."""
        panel = ("vocal_bias", "certainty", "tie_width", "lapse")
        words = [f"--{name.replace('_', '-')}={getattr(self, name)}" for name in panel]
        return [f"--world={table}", *words, *(["--held-out"] if self.clips == "held_out" else [])]


class VotesConfig(Config):
    """Made-up votes about the corpus. They follow its rewards, for demos, or with `listeners` the truth."""

    count: int = Field(400, ge=1)
    """Votes."""
    prefer: str = Field("reward_score", pattern=COLUMN)
    """Number of the index that the made-up listener likes more of."""
    seed: int = 0
    """Of the draws."""
    listeners: ListenersConfig | None = added(None)
    """Votes follow the true quality of the songs that the section `world` composes, in place of `prefer`."""


class SystemConfig(Config):
    """Clips for the evaluation: of a stage of this chain, of other weights, or of another program."""

    stage: Stage | None = None
    """Whose weights."""
    checkpoint: str | None = None
    """Weights file instead, local or s3://: that of the challenge's baseline (Row 0 of Table II), or one's own."""
    clips: str | None = None
    """Folder of finished clips instead, named by the ids of the prompts (`<id>.wav`): nothing is generated."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Seed of the noise, in place of the section's (the paper's submissions: 42 and 55)."""
    score: float | None = None
    """Score to generate for, in place of the section's."""
    scores: tuple[float, ...] | Literal["trained"] = ()
    """Scores of which the one with the highest mean reward is taken, on one candidate for each prompt of the section
    `pool`, none of which is a prompt of the evaluation: a parent is to be judged at its own best score as well.
    `trained`: scores within the range of the training, as the weights name it."""
    generate: dict[str, Any] = Field(default_factory=dict)
    """What else differs from the section `generate`: `{bundle: public-16k, sampler: {score: null}}` for weights that
    were made for another VAE and know no score."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(source is not None for source in (self.stage, self.checkpoint, self.clips)) != 1:
            raise ValueError("needs one of stage, checkpoint (a file) and clips (a folder)")
        if self.clips is not None and (self.generate or self.scores or (self.seed, self.score) != (None, None)):
            raise ValueError("clips are there already; seed, score, scores and generate say how some are generated")
        if self.scores and (self.score is not None or len(self.scores) < 2):
            raise ValueError("scores are two or more to choose from, and then there is no score")
        return self


class ReproduceConfig(Config):
    """`jobs/reproduce.py` and `ttmray reproduce`. The sections are configs of the jobs without what the chain fills in:
    outputs, checkpoints, pools, pairs, corpora and prompts."""

    output: Location = execution("runs/reproduce")
    """Run folder: a local path or s3:// prefix."""
    bundle: BundleName = DEFAULT
    """Models of all steps."""
    seed: int | None = added(None, ge=0)
    """Of everything that is drawn, in place of the seeds of the sections that name none: songs, votes, heads, weights,
    order, noise. The prompts of a `world` stay the same. null: every section has its own."""
    world: WorldConfig | None = added(None)
    """Songs that are composed first, with their prompts for the evaluation: the corpus is made of them."""
    prompts: Location | None = execution(None)
    """File of the prompts of the evaluation. Pools and pairs must not use them."""
    weights: str = Field("raw", pattern=r"^(raw|ema:[0-9.]+)$")
    """Weights that go from stage to stage: `raw` as in the released chain, or `ema:0.05`."""
    stage3_weights: str | None = added(None, pattern=r"^(raw|ema:[0-9.]+)$")
    """Those of Stage 3, where they are to be others. null: `weights`."""
    corpus: dict[str, Any]
    """`score-corpus`; of the songs of `world`, where there is one."""
    votes: VotesConfig | None = None
    """For demos: the ranker learns from made-up votes about the corpus."""
    ranker: dict[str, Any] | None = None
    """`train-ranker`."""
    reward: Literal["ranker", "bundle"] = "ranker"
    """Whose rewards condition the training, choose clips and stand in the evaluation: those of the ranker that this
    chain trains, if it trains one, or those of the bundle's own head. Only ours: the released scores of the paper's
    corpus are by TuneJury's released head."""
    trunk: dict[str, Any] | None = added(None)
    """What differs from `stage1` for weights without a score that all trainings of Stage 1 start from, so that heads
    that are compared differ in nothing else: trained here, from the bundle's own backbone without its score head where
    it has one. null: Stage 1 starts from scratch, or from its `model.init`."""
    stage1: dict[str, Any]
    """`train-sft`."""
    pool: dict[str, Any] | None = None
    """`pool`: candidates of Stage 1 for Stage 2. Without `prompts` their texts are captions of the corpus."""
    stage2: dict[str, Any] | None = None
    """`expert-iteration`; its first round has the pool above. Size, head and null of its model are those of Stage 1
    where it does not say otherwise."""
    control: bool = True
    """Stage 2 once more without its own clips, so that the gain can be told from that of more training."""
    unselected: bool = added(False)
    """Stage 2 once more with as many of its own clips, drawn by chance from those that pass the filter's gates: what
    the choice adds to training on clips of one's own, which were sampled with guidance."""
    pairs_pool: dict[str, Any] | None = None
    """What differs from `pool` for the candidates of Stage 2 that the pairs are made of; null: there are no pairs."""
    pairs: dict[str, Any] | None = None
    """`pairs`."""
    stage3: dict[str, Any] | None = None
    """`train-crpo`. Size, head and null of its model are those of the stage that it starts from where it does not say
    otherwise; the paper's head is v2 from here on."""
    generate: dict[str, Any] | None = None
    """`generate`, for each system."""
    systems: dict[str, SystemConfig] = Field(default_factory=dict)
    """What is generated and evaluated, by name; null takes one out again. Default: every trained stage."""
    evaluate: dict[str, Any] | None = None
    """`evaluate`, of all systems."""
    tables: dict[str, Any] | None = added(None)
    """`ablate`, about the weights of this chain: `stage1`, `stage2`, `control`, `unselected` and `stage3` are
    checkpoints by these names, `corpus` is a reference set, prompts, models and rewards are those of the chain, and
    what is trained for the tables differs from `stage1`. It runs last, in a folder of its own."""

    @model_validator(mode="after")
    def _of_a_world(self) -> Self:
        if self.votes is not None and self.votes.listeners is not None and self.world is None:
            raise ValueError("votes.listeners know the quality of songs that are composed here: add the section world")
        if self.world is not None and self.prompts is not None and self.world.prompts:
            raise ValueError("world.prompts are the prompts of the evaluation: leave out prompts, or set them to 0")
        return self

    @field_validator("systems")
    @classmethod
    def _named_as_files(cls, value: dict[str, SystemConfig]) -> dict[str, SystemConfig]:
        for name in value:
            if not SYSTEM_NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a system: use letters, digits, '_', '-' and '.'")
        return value

    @field_validator("systems", mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value
