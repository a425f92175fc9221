"""The config of the ablation job: which checkpoints, and which tables of which cells."""

import re
from typing import Any, Self

from pydantic import Field, model_validator

from ttmray.config import Config, Location, execution
from ttmray.models.bundle import DEFAULT, BundleName
from ttmray.models.score_heads import Head

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class CellCheckpointConfig(Config):
    """Weights under a name: a file, or a training run of this job."""

    path: str | None = None
    """Weights file, such as `runs/reproduce/stage2/expert/round-1/polish.safetensors`."""
    train: dict[str, Any] | None = None
    """What differs from the section `stage1`: `{model: {head: v2}}`."""
    init: str | None = None
    """Name of the checkpoint that the training starts from."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.train is None):
            raise ValueError("needs path (a file) or train (what differs from stage1), and not both")
        if self.init is not None and self.train is None:
            raise ValueError("init is for checkpoints that are trained here")
        return self


class CellConfig(Config):
    """A checkpoint and how it generates, or clips that are there already."""

    checkpoint: str | None = None
    """Its name."""
    clips: str | None = None
    """Folder of clips instead, local or s3://, named by the ids of the prompts (`<id>.wav`): those of another program,
    such as a baseline of one's own. Nothing is generated."""
    head: Head | None = None
    """Forward that uses its score embedding (v1, v2 and v4 share their tensors); default: its own."""
    generate: dict[str, Any] = Field(default_factory=dict)
    """What differs from the section `generate`: `{seed: 55}`, `{sampler: {score: null}}`, `{postprocess: null}`, and
    `{bundle: public-16k}` for a checkpoint of 16 kHz latents."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.checkpoint is None) == (self.clips is None):
            raise ValueError("needs checkpoint (its name) or clips (a folder), and not both")
        if self.clips is not None and (self.head is not None or self.generate):
            raise ValueError("clips are there already; head and generate say how some are generated")
        return self


class RowConfig(CellConfig):
    """A cell with a name. The paper's figures stand beside rows that have the names of the paper."""

    label: str
    baseline: bool = False
    """For the chain: stands at the top for reference, and the row after it has nothing to improve on."""


class HeadsConfig(Config):
    """Table I."""

    heads: dict[str, str]
    """Row -> checkpoint."""
    unconditional: dict[str, str] = Field(default_factory=dict)
    """Row -> checkpoint without a score."""
    scores: tuple[float, ...] = (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
    """Input scores of Score-r. The paper's grid is not public; -0.5 and 1.5 are in it."""
    at: float = 1.5
    """Input score of the clips of FAD and CLAP score; not public either."""
    steer: tuple[float, float] = (-0.5, 1.5)
    """Input scores of delta_out (paper)."""
    prompts: str | None = None
    """File of prompts, in place of the config's: the paper has the 100 of Jamendo-100 here."""
    reference: str | None = None
    """Reference set, in place of that of `evaluate`: the paper has Jamendo-100 here."""
    generate: dict[str, Any] = Field(default_factory=dict)
    """What differs from the section `generate`: the paper has no post-processing here."""

    @model_validator(mode="after")
    def _in_grid(self) -> Self:
        missing = sorted({self.at, *self.steer} - set(self.scores))
        if missing:
            raise ValueError(f"at and steer must be among scores; {missing[0]:g} is not")
        if not self.heads:
            raise ValueError("heads: name at least one row")
        return self


class StageConfig(Config):
    """A stage of Table III: the same training with two mechanisms."""

    v1: str
    """Checkpoint."""
    v2: str | None = None
    """Checkpoint; null: this stage was trained with one mechanism only."""


class FactorialConfig(Config):
    """Table III: stages x weights x forward, and the submissions."""

    stages: dict[str, StageConfig]
    """`SFT-only` and `Chain-end`."""
    submitted: tuple[RowConfig, ...] = Field(min_length=1)
    """The first is what all others are held against (Sub.1); the paper has a second seed of it (Sub.2)."""
    hybrid: str = "Hybrid"
    """Stage of the submissions."""


class SweepConfig(Config):
    """Figure 2."""

    checkpoints: dict[str, CellConfig]
    """Name in the figure -> checkpoint."""
    scores: tuple[float, ...] = Field((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0), min_length=2)
    """The range is the paper's, its grid is not public."""
    trained: tuple[float, float] = (0.0, 2.0)
    """Range of the training rewards (paper)."""
    deployed: float = 5.0
    """Input score of the submission: the dotted line."""

    @model_validator(mode="after")
    def _generated(self) -> Self:
        for name, one in self.checkpoints.items():
            if one.clips is not None:
                raise ValueError(f"checkpoints.{name}: clips have no input score; name a checkpoint")
        return self


class AblateConfig(Config):
    """`jobs/ablate.py` and `ttmray ablate`. Sections are configs of their jobs without what is filled in here."""

    output: Location = execution("runs/ablations")
    """Run folder: a local path or s3:// prefix."""
    bundle: BundleName = DEFAULT
    """Models of all steps."""
    prompts: str
    """File of the prompts of all tables but the first."""
    failed_share: float = execution(0.05, ge=0, lt=1)
    """Share of a cell's clips that may be silent or fail, and still it is finished; its tables say how many. A number
    of clips in `generate.max_failures` or `evaluate.max_failures` goes first."""
    weights: str = Field("raw", pattern=r"^(raw|ema:[0-9.]+)$")
    """Which weights of the trainings here generate."""
    references: dict[str, str] = Field(default_factory=dict)
    """Reference sets that are built here, in the run folder: name -> folder of audio or corpus run. Others are looked
    for in `evaluate.references`, the store of `ttmray reference build`."""
    stage1: dict[str, Any] | None = None
    """`train-sft`: what all trainings here have in common."""
    generate: dict[str, Any] = Field(default_factory=dict)
    """`generate`."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    """`evaluate`."""
    checkpoints: dict[str, CellCheckpointConfig]
    """All weights by name; an `init` must stand before what starts from it."""
    heads: HeadsConfig | None = None
    """Table I."""
    chain: tuple[RowConfig, ...] = ()
    """Table II, in order."""
    factorial: FactorialConfig | None = None
    """Table III."""
    sweep: SweepConfig | None = None
    """Figure 2."""
    contrasts: dict[str, tuple[RowConfig, ...]] = Field(default_factory=dict)
    """Other tables: each row is compared with the first one."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        taken = {"heads", "chain", "factorial", "sweep", "index"} & self.contrasts.keys()
        if taken:
            raise ValueError(f"contrasts.{min(taken)}: this name is taken")
        for what, names in (("checkpoints", self.checkpoints), ("contrasts", self.contrasts)):
            odd = [name for name in names if not _NAME.fullmatch(name)]
            if odd:
                raise ValueError(f"{what}: {odd[0]!r} cannot name a folder; use letters, digits, '.', '_' and '-'")
        for what, rows in (("chain", self.chain), *self.contrasts.items()):
            labels = [row.label for row in rows]
            twice = sorted({label for label in labels if labels.count(label) > 1})
            if twice:
                raise ValueError(f"{what}: two rows are called {twice[0]}")
            if what != "chain" and len(rows) < 2:
                raise ValueError(f"contrasts.{what}: a contrast has two rows or more")
        return self
