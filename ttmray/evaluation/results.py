"""Reading the folder that `ttmray evaluate` writes: `results.json` and `clips.parquet`."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from ttmray.errors import UserError
from ttmray.models.bundle import means_nothing
from ttmray.storage import Folder, parquet_table

RESULTS, CLIPS = "results.json", "clips.parquet"
COLUMNS = {
    "system": pa.string(),
    "prompt_id": pa.string(),
    "sample": pa.int64(),
    "prompt": pa.string(),
    "path": pa.string(),
    "sha256": pa.string(),
    "duration_s": pa.float64(),
    "clap_score": pa.float64(),
    "reward": pa.float64(),
    "lufs": pa.float64(),
    "true_peak_db": pa.float64(),
    "silence": pa.float64(),
    "status": pa.string(),
    "reason": pa.string(),
    "message": pa.string(),
    "ccs": pa.float64(),
}
"""What a row of `clips.parquet` holds: one clip of one system for one prompt. Further columns are numbers of
`clip_metrics`."""
QUALITY = "estimated_quality"
"""The one of them that is compared and shown like a score; None in rows of evaluations without it."""


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class Measured(_Read):
    """A metric of one system, see `ttmray.evaluation.metrics.Metric`."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n_generated: int = 0
    n_reference: int = 0
    protocol: str = ""
    warnings: tuple[str, ...] = ()
    interval: str = ""


class System(_Read):
    name: str
    folder: str = ""
    clips: int = 0
    failed: int = 0
    prompts: int = 0
    metrics: dict[str, Measured] = {}


class Comparison(_Read):
    """A paired test of a - b; p_holm is adjusted over the whole table."""

    a: str
    b: str
    metric: str
    n: int
    mean_a: float | None = None
    mean_b: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    t: float | None = None
    p: float | None = None
    p_holm: float | None = None
    p_wilcoxon: float | None = None
    d_z: float | None = None
    wins: int | None = None
    ties: int | None = None
    losses: int | None = None
    n_needed: int | None = None
    significant: bool = False


class Results(_Read):
    kind: Literal["evaluation"]
    created: str = ""
    protocol: str = ""
    bundle: str = ""
    note: str = ""
    systems: tuple[System, ...]
    comparisons: tuple[Comparison, ...] = ()
    reference: dict[str, Any] | None = None
    leaks: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    grave: tuple[str, ...] = ()
    """Those of `warnings` without which the numbers mislead; the first of them."""
    license_notes: tuple[str, ...] = ()
    """A line per model of the bundle that made the numbers; none where its weights have no licence."""

    @property
    def meaningless(self) -> bool:
        """Whether the models that made the numbers are untrained: nothing is then marked as better."""
        return means_nothing(self.bundle or self.protocol)

    def intervals(self) -> list[str]:
        """What the intervals of the metrics are, a line per kind."""
        kinds: dict[str, list[str]] = {}
        for system in self.systems:
            for name, metric in system.metrics.items():
                if metric.low is not None and metric.interval:
                    kinds.setdefault(metric.interval, []).append(name)
        return [f"{', '.join(dict.fromkeys(names))}: {kind}" for kind, names in kinds.items()]


def read_results(folder: Folder) -> Results:
    """`results.json` of an evaluation.

    Raises:
        UserError: there is none, or it is not what an evaluation writes.
    """
    if not folder.exists(RESULTS):
        raise UserError(f"{folder} is no evaluation: it has no {RESULTS}.", "Give the output of `ttmray evaluate`.")
    try:
        return Results.model_validate_json(folder.read(RESULTS))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{folder.path(RESULTS)}: {where + ': ' if where else ''}{first['msg']}.", "Evaluate again."
        ) from error


def read_clips(folder: Folder, results: Results) -> list[dict[str, Any]]:
    """Rows of `clips.parquet` in its order, with the columns of `COLUMNS`, its further numbers and `QUALITY`; what is
    not finite is None.

    Raises:
        UserError: missing or damaged, lacks a column, or names a system that `results.json` does not have.
    """
    where = folder.path(CLIPS)
    data = folder.read(CLIPS)
    try:
        table = parquet_table(data)
        if absent := [name for name in COLUMNS if name not in table.column_names]:
            raise UserError(f"{where} lacks the columns {', '.join(absent)}.", "Evaluate again.")
        numbers = {f.name: f.type for f in table.schema if f.name not in COLUMNS and pa.types.is_floating(f.type)}
        schema = COLUMNS | numbers
        rows = [
            {QUALITY: None, **row} for row in table.select(list(schema)).cast(pa.schema(schema.items())).to_pylist()
        ]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{where} cannot be read: {error}", "Evaluate again.") from error
    names = {system.name for system in results.systems}
    if strange := sorted({str(row["system"]) for row in rows} - names):
        raise UserError(f"{where} has clips of {strange[0]!r}, which {RESULTS} does not know.", "Evaluate again.")
    return [{name: _finite(value) for name, value in row.items()} for row in rows]


def clip_address(results: Results, row: Mapping[str, Any]) -> tuple[Folder, str]:
    """Folder and name of a clip's file; relative paths lie in the system's folder."""
    path = str(row["path"])
    if "://" in path or path.startswith("/"):
        parent, _, name = path.rpartition("/")
        return Folder.at(parent or "/"), name
    folder = next(system.folder for system in results.systems if system.name == row["system"])
    return Folder.at(folder), path


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
