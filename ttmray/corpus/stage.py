"""What a stage of the pipeline declares of itself, on its class; runners, placement and the index follow from it.

A stage of one's own is a class like those of `corpus/stages.py`, named in `extra_stages` of the corpus config.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import pyarrow as pa

from ttmray.corpus.unit import Unit

AT_HOME = frozenset({"track_audio"})
"""Arrays that never leave their process: they are too large to travel."""


class Stage(ABC):
    """Takes a unit and returns it; knows nothing of who runs it.

    A stage from outside is made as `Class(models, load, **options)`: `ttmray.models.bundle.Models` with the roles that
    it asks for, the `LoadOptions` of the run (device, batch, threads), and the options of the config.
    """

    name: ClassVar[str]
    """Of the stage in rows, timing and messages; two variants of a stage share it."""
    scope: ClassVar[Literal["track", "clip", "unit"]] = "clip"
    """What may run alone where a process dies: single tracks, which become rows; single clips; nothing less than a
    unit. Where a batch of a clip stage fails, its clips are tried one by one."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Arrays that it reads where they are there: of `Unit.clips`, or `texts` or `track_audio` of the unit."""
    writes: ClassVar[tuple[str, ...]] = ()
    """Arrays that it adds. The runner drops each one after its last reader."""
    columns: ClassVar[Mapping[str, pa.DataType]] = {}
    """Columns of the index that it fills beside those of `index.SCHEMA`: null where a clip is not ok."""
    model_roles: ClassVar[tuple[str, ...]] = ()
    """Models of the bundle that it uses."""
    resources: ClassVar[str] = ""
    """Field of the config's `runtime` that says what its workers get; empty: it shares the process of its neighbour."""
    version: ClassVar[str] = ""
    """Of a stage from outside: part of the run's identity, so change it with what the stage computes."""

    @abstractmethod
    def __call__(self, unit: Unit) -> Unit:
        """Fill rows and add arrays, whose first axis runs over the rows that are ok.

        Raises:
            ClipError, or any exception: the clips of the unit are tried one by one, and the bad ones are quarantined.
            UserError, OSError, MemoryError: what every other clip would meet, too; it ends the job.
        """


def alive(stages: Sequence[type[Stage]], position: int) -> frozenset[str]:
    """Arrays that stages before `position` write and stages from there on read: what has to cross."""
    written = {name for stage in stages[:position] for name in stage.writes}
    return frozenset(written & reads(stages[position:]))


def reads(stages: Sequence[type[Stage] | Stage]) -> frozenset[str]:
    """Arrays that any of the stages reads."""
    return frozenset(name for stage in stages for name in stage.reads)
