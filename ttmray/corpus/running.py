"""Stages in one process: building them with their models, and running them over a unit."""

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from ttmray.corpus.stage import Stage, reads
from ttmray.corpus.unit import Unit, merge
from ttmray.json_text import read_json
from ttmray.models import one_thread
from ttmray.models.bundle import Models
from ttmray.plugins import named
from ttmray.quarantine import together

Makers = Mapping[type[Stage], Callable[[Models], Stage]]
"""The stages of a run in order: the class, which declares, and how it is made of loaded models."""


@dataclass(frozen=True)
class Chain:
    """Stages of one process in order, and the arrays that stages of other processes read after them."""

    stages: Sequence[Stage]
    read_later: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Job(ABC):
    """What any process needs to rebuild the stages of a run; small, plain and printable.

    Attributes:
        config: of the run, as JSON.
        root: folder of the songs; empty where there are none.
        protocol: name of the scores' protocol.
        run: fingerprint of the run, which its units name.
    """

    config: str
    root: str
    protocol: str
    run: str = ""

    def to_json(self) -> str:
        return json.dumps({"job": f"{type(self).__module__}:{type(self).__qualname__}", **asdict(self)})

    @staticmethod
    def from_json(text: str) -> "Job":
        fields = read_json(text)
        job: Job = named(fields.pop("job"))(**fields)
        return job

    @property
    @abstractmethod
    def output(self) -> str:
        """The run folder."""

    @property
    @abstractmethod
    def clip_timeout_s(self) -> float:
        """A clip (or track) that runs alone longer than this is quarantined."""

    @abstractmethod
    def makers(self) -> Makers:
        """The stages of the run."""

    @abstractmethod
    def load(self, roles: Collection[str]) -> Models:
        """The models of some roles."""

    def stages(self, names: Sequence[str] | None = None) -> list[type[Stage]]:
        """Classes of the stages of some names, in the order of the run; default: all."""
        return [stage for stage in self.makers() if names is None or stage.name in names]

    def build(self, names: Sequence[str], models: Models | None = None) -> Chain:
        """Some stages with their models, and this process limited to its share of threads.

        Args:
            models: default: those that the stages need, loaded.
        """
        makers, chosen, everything = self.makers(), self.stages(names), self.stages()
        if models is None:
            roles = {role for stage in chosen for role in stage.model_roles}
            models = self.load(roles) if roles else Models()
            one_thread()
        later = everything[everything.index(chosen[-1]) + 1 :]
        return Chain([makers[stage](models) for stage in chosen], reads(later))


def run_stages(chain: Chain, unit: Unit) -> Unit:
    """Stages in order; an array goes as soon as no later stage reads it.

    Where a whole batch of a clip stage fails, its clips are tried one by one to find the bad ones.
    """
    for position, stage in enumerate(chain.stages, 1):
        read = unit.timed()
        unit = _run_stage(stage, unit)
        unit.timing[stage.name] = times = read(unit)
        if stage.model_roles and _has_gpu():
            times["gpu_s"] = times["wall_s"]
        unit.keep(chain.read_later | {name for later in chain.stages[position:] for name in later.reads})
    return unit


def _has_gpu() -> bool:
    """Whether this process has opened a GPU."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def _run_stage(stage: Stage, unit: Unit) -> Unit:
    if stage.scope != "clip":
        return _filled(stage, stage(unit))
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
        return _filled(stage, stage(unit if len(some) == len(suspects) else part(*some[0])))

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


def _filled(stage: Stage, unit: Unit) -> Unit:
    """The unit with plain values in the columns that the stage adds to the index.

    Raises:
        ValueError, pa.ArrowException: a value that is not finite, or not of the column's type.
    """
    for name, kind in stage.columns.items():
        for row in unit.ok_rows():
            value = pa.scalar(row.get(name), kind).as_py()
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} of {row['key']} is {value}")
            row[name] = value
    return unit
