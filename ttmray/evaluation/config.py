"""Settings of the evaluation job."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ttmray.config import Config, Location, added, execution
from ttmray.evaluation.judge import JudgeConfig
from ttmray.evaluation.measure import MeasureConfig
from ttmray.evaluation.metrics import NEAR_DUPLICATE, RESAMPLES
from ttmray.evaluation.reference import STORE
from ttmray.models.bundle import DEFAULT, BundleName
from ttmray.plugins import ENTRY
from ttmray.statistics import Seeds


class EvaluateConfig(Config):
    """`ttmray evaluate` and `jobs/evaluate.py`."""

    folders: tuple[str, ...] = execution(min_length=1)
    """Systems: folders of audio, local or s3://, made by `ttmray generate` or not; `NAME=FOLDER` names one."""
    prompts: Location | None = execution(None)
    """File of prompts with their ids (CSV, TSV, JSON, JSON lines). Clips are matched to them by the manifest of a
    generation run, else by name: `<id>.wav`, or `<id>_<k>.wav` and `<id>_s<k>.wav` for several samples."""
    texts: tuple[str, ...] = execution(())
    """Prompts, instead of a file."""
    reference: str | None = execution(None)
    """Reference set of FAD and KAD: its name in the store, or its folder (`ttmray reference build`). null: none."""
    reference_stem: Literal["mix", "instrumental"] | None = execution(None)
    """What the reference set must be of; another one is refused. The paper's are instrumental. null: either."""
    training: str | None = execution(None)
    """Corpus run or reference set that the systems were trained on: near-duplicates and leaks are looked for there."""
    references: Location = execution(STORE)
    """Folder of the reference sets, local or s3://."""
    output: Location = execution("runs/evaluation")
    """Folder of the results: a local path or s3:// prefix."""
    bundle: BundleName = DEFAULT
    """Set of models. `micro` knows the music of the built-in composer alone; scores of `debug` mean nothing."""
    reward_text: Literal["empty", "caption"] = "empty"
    """What the reward sees as text; CLAP scores always use the raw prompt."""
    baseline: str | None = None
    """Name of the system that every other one is compared with; null: all pairs."""
    parent: str | None = added(None)
    """Name of the system that the others were trained from: `parent_distance` is the mean of 1 - cosine between the
    CLAP embeddings of a clip and of the parent's clip of the same prompt and sample, `parent_fad` the Fréchet distance
    to all of the parent's clips. null: neither."""
    alpha: float = Field(0.05, gt=0, lt=1)
    """Chance of even one false star in the paired table (Holm)."""
    near_duplicate: float = Field(NEAR_DUPLICATE, ge=-1, le=1)
    """CLAP cosine from which two clips count as the same."""
    resamples: int = Field(RESAMPLES, ge=10, le=100_000)
    """Half-samples behind the interval of FAD, KAD and diversity."""
    seed: int = Field(0, ge=0)
    """Of all resampling."""
    seeds: Seeds = "nested"
    """What samples of a prompt have in common. `nested`: nothing, each has noise of its own, as those of `ttmray
    generate`. `crossed`: sample k of every prompt shares something, such as a training run or the noise, so intervals
    of mean scores and levels cover other such seeds as well. Paired tests use the means of prompts in both cases."""
    judge: JudgeConfig | None = None
    """Judge of the concept coverage score; null: none."""
    metrics: tuple[Annotated[str, Field(pattern=ENTRY)], ...] = added(())
    """Metrics of your own, `module:function`: of a system's clips that are ok it is given the CLAP embeddings (n, 512)
    and the rows of `clips.parquet` as dictionaries, and returns a number. The function's name is the metric's."""
    clip_metrics: tuple[str, ...] = added(())
    """What else is measured of the audio of every clip. `small_world` estimates the true quality of synthetic music and
    the strengths of the faults that it follows from (`ttmray.synth.measures`): for bundles that were trained on such
    music alone. `rhythm` (`rhythm_regularity`, `rhythm_jitter_ms`) and `tuning` (`tuning_deviation`, cents) are
    defined in `ttmray.synth.regularity`. `vocals`: energy of what the bundle's separator takes for vocals over that of
    the clip (`vocal_ratio`). Or functions of your own, `module:function`: of (channels, samples) float32 at 44.1 kHz
    they return name -> number."""
    max_failures: Annotated[int, Field(ge=0)] = execution(0)
    """Exit code 3 when more clips than this are missing, cannot be measured, or get no answer of the judge."""
    runtime: MeasureConfig = execution(MeasureConfig())

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompts is None) == (not self.texts):
            raise ValueError("needs prompts (a file: prompts=FILE) or texts (texts=[a calm piano]), and not both")
        return self
