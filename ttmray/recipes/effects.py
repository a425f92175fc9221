"""Runs of the chain as scores by cell and prompt, and differences of two cells: what findings are decided on.

A difference is taken prompt by prompt and seed by seed, in standard deviations over the clips of that seed's cell
before. Every seed trains a ranker of its own, whose scale is its own, so rewards of different seeds can be put together
in no other unit. Its interval is over prompts and seeds (`statistics.crossed`).

A clip that failed or is silent is the worst that there is: it has the lowest reward and CLAP score of its run and the
lowest quality, and is not passed over, or whatever collapses would be judged by what is left of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ttmray.errors import UserError
from ttmray.evaluation.compare import ClipScore, prompt_means
from ttmray.evaluation.results import QUALITY, read_clips, read_results
from ttmray.statistics import crossed
from ttmray.storage import Folder
from ttmray.synth.faults import FLOOR
from ttmray.training.logbook import METRICS as LOG
from ttmray.training.logbook import read_lines

MARGIN = 0.2
"""Standard deviations over clips: a small effect (Cohen 1988)."""
METRICS = ("reward", QUALITY, "clap_score", "vocal_ratio")
NAMES = {"reward": "reward", QUALITY: "estimated quality", "clap_score": "CLAP score", "vocal_ratio": "vocals"}
GAP = "gap"
"""Of an effect: reward less estimated quality, each in its own standard deviations."""
LEARNED = "implicit_accuracy"
"""In the log of CRPO: share of the pairs whose winner the model prefers by now."""
Row = tuple[str, ...]
"""Table and row, as `cells.json` has them; of tables of scores the score, too."""
Pair = tuple[str, Row, Row]
"""Name of a difference, the row after and the row before."""


@dataclass(frozen=True)
class Seed:
    """One run: cell -> metric -> prompt -> mean over samples; row -> cell; and the deviations of single clips.

    Attributes:
        deviations: (cell, metric) -> standard deviation over clips.
        prompts: prompt -> its text.
        failed: cell -> clips that failed.
        learned: share of the pairs that CRPO got right at its end; None where it has left no log.
        about: for people.
    """

    name: str
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    rows: Mapping[Row, str]
    deviations: Mapping[tuple[str, str], float]
    prompts: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    learned: float | None = None
    about: Mapping[str, str] = field(default_factory=dict)

    def of(self, row: Row, metric: str) -> Mapping[str, float]:
        """Prompt -> score of a row; empty where there is none."""
        return self.scores.get(self.rows.get(row, ""), {}).get(metric, {})

    def unit(self, row: Row, metric: str) -> float:
        """Standard deviation over the clips of a row; 0 where there is none."""
        return self.deviations.get((self.rows.get(row, ""), metric), 0.0)


@dataclass(frozen=True)
class Effect:
    """A mean difference in standard deviations over clips, with its interval over prompts and seeds; over prompts alone
    where there is one seed.

    Attributes:
        raw: mean difference as measured.
        by_seed: mean difference of each seed.
        failed: clips of both rows that failed, and count as the worst.
    """

    name: str
    metric: str
    value: float
    low: float
    high: float
    raw: float
    prompts: int
    by_seed: Mapping[str, float]
    failed: int = 0

    @property
    def rises(self) -> bool:
        return self.low > 0

    @property
    def falls(self) -> bool:
        return self.high < 0

    @property
    def little(self) -> bool:
        """Within the margin, with all of its interval."""
        return self.low > -MARGIN and self.high < MARGIN

    def __str__(self) -> str:
        failed = f", {self.failed} clips failed" if self.failed else ""
        return f"{NAMES[self.metric]} {self.value:+.2f} SD [{self.low:+.2f}, {self.high:+.2f}]{failed}"


def effect(
    seeds: Sequence[Seed],
    pair: Pair,
    metric: str,
    *,
    only: Callable[[str], bool] | None = None,
    confidence: float = 0.95,
) -> Effect | None:
    """The difference of two rows on the prompts that both have in every seed; None where a seed lacks one.

    Args:
        metric: one of `METRICS`, or `GAP`.
        only: which prompts, by their texts; default: all.
    """
    name, after, before = pair
    if metric == GAP:
        tables = [_table(seeds, pair, one, only) for one in ("reward", QUALITY)]
        if tables[0] is None or tables[1] is None or tables[0][0] != tables[1][0]:
            return None
        common, table = tables[0][0], tables[0][1] - tables[1][1]
        raw = table
    else:
        numbers = _table(seeds, pair, metric, only)
        if numbers is None:
            return None
        common, table = numbers
        raw = table * np.array([seed.unit(before, metric) for seed in seeds])
    one = crossed(table, confidence)
    assert one is not None  # there are two prompts or more
    by_seed = dict(zip([seed.name for seed in seeds], table.mean(axis=0).tolist(), strict=True))
    failed = sum(seed.failed.get(seed.rows[row], 0) for seed in seeds for row in (after, before))
    return Effect(name, metric, one.value, one.low, one.high, float(raw.mean()), len(common), by_seed, failed)


def _table(
    seeds: Sequence[Seed], pair: Pair, metric: str, only: Callable[[str], bool] | None
) -> tuple[list[str], np.ndarray] | None:
    """Prompts, and differences (prompts, seeds) in standard deviations."""
    _, after, before = pair
    sides = [(seed.of(after, metric), seed.of(before, metric)) for seed in seeds]
    common = sorted(set.intersection(*(set(a) & set(b) for a, b in sides))) if sides else []
    if only is not None:
        common = [one for one in common if only(seeds[0].prompts[one])]
    units = np.array([seed.unit(before, metric) for seed in seeds])
    if len(common) < 2 or not (units > 0).all():
        return None
    return common, np.array([[a[one] - b[one] for a, b in sides] for one in common]) / units


def read_seeds(runs: Sequence[str]) -> list[Seed]:
    """The cells of several runs.

    Raises:
        UserError: a folder without tables, the same results twice, or runs with other prompts.
    """
    names = [Folder.at(run).uri.split("/") for run in runs]
    short = [one[-1] for one in names]
    labels = ["/".join(one[-2:]) if short.count(one[-1]) > 1 else one[-1] for one in names]
    seeds = [read_seed(run, label) for run, label in zip(runs, labels, strict=True)]
    for i, one in enumerate(seeds):
        for other in seeds[:i]:
            if one.scores == other.scores:
                raise UserError(
                    f"{one.name} and {other.name} hold the same results.", "Name every run once, each of its own seed."
                )
            shared = one.prompts.keys() & other.prompts.keys()
            if differing := sorted(name for name in shared if one.prompts[name] != other.prompts[name]):
                raise UserError(
                    f"{one.name} and {other.name} have other prompts by the name {differing[0]}.",
                    "Runs are paired by their prompts: give the chains the same ones.",
                )
    return seeds


def read_seed(run: str, name: str = "") -> Seed:
    """The cells of a run.

    Raises:
        UserError: it has no tables, or an evaluation is damaged.
    """
    root = Folder.at(run)
    tables = root.sub("tables") if root.exists("tables/cells.json") else root
    if not tables.exists("cells.json"):
        raise UserError(f"{run} has no tables: cells.json is missing.", "Run the chain with its section `tables`.")
    listed: dict[str, dict[str, Any]] = tables.read_json("cells.json")
    rows: dict[Row, str] = {}
    for table, cells in listed.items():
        for row, cell in cells.items():
            of_scores = cell if isinstance(cell, dict) else {None: cell}
            for score, one in of_scores.items():
                rows[(table, row) if score is None else (table, row, score)] = one
    clips: dict[str, list[dict[str, Any]]] = {}
    about: dict[str, str] = {}
    for cell in dict.fromkeys(rows.values()):
        folder = tables.sub(f"cells/{cell}/evaluation")
        results = read_results(folder)
        clips[cell] = read_clips(folder, results)
        about = {"protocol": results.protocol, "created": results.created}
    worst = _worst([row for some in clips.values() for row in some])
    scores, deviations = {}, {}
    for cell, some in clips.items():
        values = [one for row in some for one in _values(cell, row, worst)]
        scores[cell] = {metric: means for (metric, _), means in prompt_means(values).items()}
        for metric in scores[cell]:
            of_metric = [one.value for one in values if one.metric == metric]
            deviations[cell, metric] = float(np.std(of_metric, ddof=1)) if len(of_metric) > 1 else 0.0
    return Seed(
        name or root.name,
        scores,
        rows,
        deviations,
        {row["prompt_id"]: row["prompt"] or "" for some in clips.values() for row in some},
        {cell: sum(row["status"] != "ok" for row in some) for cell, some in clips.items()},
        _learned(root.sub("stage3")),
        about,
    )


def _worst(clips: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a clip that failed has of every metric that all others of the run have."""
    worst: dict[str, float] = {}
    for metric in ("reward", "clap_score", QUALITY):
        known = [row[metric] for row in clips if row["status"] == "ok" and row.get(metric) is not None]
        if known:
            worst[metric] = FLOOR if metric == QUALITY else min(known)
    return worst


def _values(cell: str, row: Mapping[str, Any], worst: Mapping[str, float]) -> list[ClipScore]:
    values = {metric: row.get(metric) for metric in METRICS} if row["status"] == "ok" else worst
    return [ClipScore(cell, row["prompt_id"], name, value) for name, value in values.items() if value is not None]


def _learned(stage: Folder) -> float | None:
    """Mean implicit accuracy in the last quarter of a CRPO's log."""
    if not stage.exists(LOG):
        return None
    shares = [row[LEARNED] for row in read_lines(stage) if row.get(LEARNED) is not None]
    return float(np.mean(shares[-max(1, len(shares) // 4) :])) if shares else None
