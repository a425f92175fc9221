"""Stages in one process: building them with their models, and running them over a unit."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ttmray.corpus.config import CorpusConfig
from ttmray.corpus.stages import STAGES, Context, Stage
from ttmray.corpus.unit import Unit, merge
from ttmray.models import one_thread
from ttmray.models.bundle import LoadOptions, Models, open_bundle
from ttmray.models.scoring import SAMPLE_RATE
from ttmray.quarantine import together

TRACK_STAGES = ("decode",)
WHOLE_UNIT_STAGES = ("text", "write")
"""Stages that do not work clip by clip and therefore never run alone."""


@dataclass(frozen=True)
class Job:
    """What any process needs to rebuild the stages; small, plain and printable."""

    config: str
    root: str
    protocol: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        return cls(**json.loads(text))

    @property
    def corpus(self) -> CorpusConfig:
        return CorpusConfig.model_validate_json(self.config)

    def build(self, names: Sequence[str]) -> list[Stage]:
        """Stages with their models loaded, and this process limited to its share of threads."""
        config = self.corpus
        roles = {role for name in names for role in STAGES[name].model_roles}
        options = LoadOptions(
            device=config.runtime.device,
            batch=config.runtime.batch,
            threads=config.runtime.threads,
            clip_samples=round(config.segments.clip_s * SAMPLE_RATE),
            instrumental=config.separation.instrumental,
            overlap=config.separation.overlap,
            precision=config.separation.precision,
        )
        models = open_bundle(config.bundle).load(roles, options) if roles else Models()
        one_thread()
        context = Context(config, self.root, self.protocol, models)
        return [STAGES[name](context) for name in names]


def run_stages(stages: Sequence[Stage], unit: Unit) -> Unit:
    """Stages in order. Where a whole batch fails, its clips are tried one by one to find the bad ones."""
    for stage in stages:
        with unit.timed(stage.name):
            unit = _run_stage(stage, unit)
    return unit


def _run_stage(stage: Stage, unit: Unit) -> Unit:
    if stage.name in TRACK_STAGES or stage.name in WHOLE_UNIT_STAGES:
        return stage(unit)
    if not unit.ok_rows():  # where every clip failed in one stage, there are no arrays for the next one
        unit.clips, unit.track_audio = {}, {}
        return unit
    rows = [dict(row) for row in unit.rows]
    suspects = [(row["track_id"], row["key"]) for row in unit.ok_rows()]

    def part(track: str, key: str) -> Unit:
        unit.rows = rows  # as they were before the stage
        alone = unit.part({track}, {key})
        alone.track_audio = unit.track_audio
        return alone

    def run(some: Sequence[tuple[str, str]]) -> Unit:
        return stage(unit if len(some) == len(suspects) else part(*some[0]))

    outcomes = together(suspects, run, "Lower runtime.batch or runtime.models.workers.")
    if len(outcomes) == 1 and isinstance(outcomes[0][1], Unit):
        return outcomes[0][1]
    parts = []
    for some, outcome in outcomes:
        if isinstance(outcome, Unit):
            parts.append(outcome)
        else:
            bad = part(*some[0])
            bad.track_audio = {}
            bad.drop({0: outcome}, stage.name)
            parts.append(bad)
    return merge(unit, parts)
