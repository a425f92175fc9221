"""The tables of the paper from evaluated cells: marks, best values, the paper's own figures beside ours.

Nothing here runs a model. A cell is one system (a checkpoint under one way of generating) with its evaluation; its
scores per prompt are means over the samples of the prompt.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ttmray.errors import UserError
from ttmray.evaluation.compare import (
    COMPARED,
    ClipScore,
    comparisons,
    prompt_means,
    without_marks,
)
from ttmray.evaluation.results import QUALITY, Results
from ttmray.recipes.published import Published
from ttmray.statistics import Alternative, Paired, mean_interval, paired, pearson, pearson_interval

ALPHA = 0.05
STEERED = {"reward": ("score_r", "delta_out"), QUALITY: ("quality_r", "delta_quality")}
"""What follows the input score: the names of its correlation and of its difference."""
DAGGER, TIE = "†", "∗"
TITLES = {
    "fad": "FAD-CLAP",
    "clap_score": "CLAP score",
    "reward": "Reward",
    "score_r": "Score-r",
    "delta_out": "Δout",
    QUALITY: "Est. quality",
    "quality_r": "Quality-r",
    "delta_quality": "Δquality",
}
LOWER_IS_BETTER = {"fad"}
TESTED = ("clap_score", "reward")
"""Metrics of single clips. FAD is one number per system and has an interval instead of a paired test."""
ESTIMATE = (
    "Est. quality: true quality on the scale of the small world, estimated from the audio alone "
    "(ttmray.synth.measures), not known; no system was trained on it."
)


@dataclass(frozen=True)
class Cell:
    """A system with its evaluation.

    Attributes:
        fad: value and interval, None where there was no reference set or too few clips.
        scores: metric -> prompt id -> mean over the samples.
        clips: metric -> (n,) score of every clip.
        prompts: metric -> (n,) its prompt id; a metric that is not in it has one clip per prompt, in the order of
            `scores`.
        failed: clips that are in no metric, because they are missing, silent or damaged.
        ends: metric -> interval of its mean as the evaluation has it; of a metric that is not in it, t over prompts.
    """

    fad: tuple[float | None, float | None, float | None]
    scores: Mapping[str, Mapping[str, float]]
    clips: Mapping[str, np.ndarray]
    protocol: str = ""
    failed: int = 0
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ends: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)

    def prompts_of(self, metric: str) -> Sequence[str]:
        """Prompt id of every value of `clips[metric]`."""
        return self.prompts.get(metric) or list(self.scores[metric])

    def mean(self, metric: str) -> float | None:
        values = list(self.scores.get(metric, {}).values())
        return float(np.mean(values)) if values else None


@dataclass(frozen=True)
class Value:
    """A number of a table with the end points of its 95 % interval, its mark, what the paper has in its place, and of
    how many prompts it is; 0: not known."""

    value: float | None
    low: float | None = None
    high: float | None = None
    mark: str = ""
    paper: Published | None = None
    n: int = 0


@dataclass(frozen=True)
class CellTable:
    """A table of one row per system.

    Attributes:
        labels: headers of the leading columns of text.
        metrics: headers of the columns of numbers, keys of `TITLES`.
        rows: texts of the leading columns, and metric -> value.
        notes: what a reader must know, one sentence each.
        pairs: paired comparisons behind the marks, see `compare.comparisons`.
        meaningless: why no number means anything; the table then marks none, and every file of it says so.
    """

    name: str
    caption: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], Mapping[str, Value]], ...]
    notes: tuple[str, ...] = ()
    pairs: tuple[Mapping[str, Any], ...] = ()
    meaningless: str = ""

    def unmarked(self, why: str) -> "CellTable":
        """The same without daggers, stars and bold, because its numbers mean nothing."""
        rows = tuple(
            (texts, {metric: replace(value, mark="") for metric, value in values.items()})
            for texts, values in self.rows
        )
        return replace(self, rows=rows, pairs=tuple(without_marks(self.pairs)), meaningless=why)


def read_cell(results: Results, clips: Sequence[Mapping[str, Any]]) -> Cell:
    """The cell of an evaluation of one system, see `results.read_results` and `read_clips`.

    Raises:
        UserError: the evaluation has no clip with a score.
    """
    (system,) = results.systems
    ok = [row for row in clips if row["status"] == "ok"]
    rows = [
        ClipScore(system.name, row["prompt_id"], metric, row[metric])
        for row in ok
        for metric in COMPARED
        if row.get(metric) is not None
    ]
    if not rows:
        raise UserError(f"{system.folder}: no clip has a score.", "See its evaluation for the reasons.")
    fad = system.metrics.get("fad")
    return Cell(
        (fad.value, fad.low, fad.high) if fad else (None, None, None),
        {metric: scores for (metric, _), scores in prompt_means(rows).items()},
        {metric: np.array([row.value for row in rows if row.metric == metric]) for metric in COMPARED},
        results.protocol,
        system.failed,
        {metric: [row.prompt_id for row in rows if row.metric == metric] for metric in COMPARED},
        {metric: (one.low, one.high) for metric, one in system.metrics.items() if metric in COMPARED},
    )


def tested(cells: Iterable[Cell]) -> tuple[str, ...]:
    """Metrics of single clips that a table of these cells has."""
    return (*TESTED, QUALITY) if any(cell.scores.get(QUALITY) for cell in cells) else TESTED


def _estimate(cells: Iterable[Cell]) -> tuple[str, ...]:
    return (ESTIMATE,) if QUALITY in tested(cells) else ()


def values_of(cell: Cell, paper: Mapping[str, Published] | None = None) -> dict[str, Value]:
    """FAD, CLAP score and reward, with the intervals of their evaluations."""
    known = paper or {}
    value, low, high = cell.fad
    by_metric = {"fad": Value(value, low, high, paper=known.get("fad"))}
    for metric in (*TESTED, QUALITY):
        values = np.array(list(cell.scores.get(metric, {}).values()))
        ends = cell.ends.get(metric) or mean_interval(values) or (None, None)
        by_metric[metric] = Value(cell.mean(metric), *ends, paper=known.get(metric), n=len(values))
    return by_metric


def head_table(
    rows: Mapping[str, Mapping[float, Cell]],
    unconditional: Mapping[str, Cell],
    at: float,
    steer: tuple[float, float],
) -> CellTable:
    """Table I: FAD and CLAP score at one input score; how the reward of the output follows the input score.

    Score-r is Pearson's correlation of input score and reward over all clips of all input scores, its interval over
    prompts, which have clips at each score; delta_out is the mean reward at the upper score of `steer` minus that at
    the lower.

    Args:
        rows: head -> input score -> cell.
        unconditional: backbones without a score, which have no correlation.
        at, steer: must be among the input scores.
    """
    lines: list[tuple[tuple[str, ...], Mapping[str, Value]]] = []
    for name, cell in unconditional.items():
        lines.append(((name,), values_of(cell) | dict.fromkeys([*STEERED["reward"], *STEERED[QUALITY]], Value(None))))
    for name, cells in rows.items():
        followed: dict[str, Value] = {}
        for metric, (r, delta) in STEERED.items():
            followed |= {r: correlation(cells, metric), delta: _moved(cells, steer, metric)}
        lines.append(((name,), values_of(cells[at]) | followed))
    everyone = [*unconditional.values(), *(cell for cells in rows.values() for cell in cells.values())]
    judged = [metric for metric in STEERED if metric == "reward" or QUALITY in tested(everyone)]
    return CellTable(
        "heads",
        "Score-conditioning heads (Table I of the paper)",
        ("head",),
        ("fad", "clap_score", *(name for metric in judged for name in STEERED[metric])),
        tuple(lines),
        (
            f"FAD-CLAP and CLAP score are of the clips at s = {at:g}; which input scores the paper's columns are of is "
            "not public, nor is its grid.",
            f"Score-r: Pearson's r of input score and reward over all clips at "
            f"s = {', '.join(f'{score:g}' for score in next(iter(rows.values()), {}))}, its interval over prompts. "
            f"Δout: mean reward at s = {steer[1]:+g} minus that at {steer[0]:+g}.",
            "The paper's text gives only that score-conditioned heads lie 0.025 to 0.040 below the unconditional FAD.",
            *(["Quality-r and Δquality: the same of the estimated quality."] if len(judged) > 1 else []),
            *_estimate(everyone),
            *_failures(unconditional),
            *_failures({f"{name}, s = {s:g}": cell for name, cells in rows.items() for s, cell in cells.items()}),
        ),
    )


def correlation(cells: Mapping[float, Cell], metric: str) -> Value:
    """Pearson's correlation of the input score and a metric over all clips, its interval over prompts."""
    if not all(len(cell.clips.get(metric, ())) for cell in cells.values()):
        return Value(None)
    inputs = np.concatenate([np.full(len(cell.clips[metric]), score) for score, cell in cells.items()])
    outputs = np.concatenate([cell.clips[metric] for cell in cells.values()])
    prompts = [prompt for cell in cells.values() for prompt in cell.prompts_of(metric)]
    low, high = pearson_interval(inputs, outputs, prompts) or (None, None)
    return Value(pearson(inputs, outputs), low, high, n=len(set(prompts)))


def _moved(cells: Mapping[float, Cell], steer: tuple[float, float], metric: str) -> Value:
    effect = against(cells[steer[1]], cells[steer[0]], metric)
    return Value(effect.difference, effect.low, effect.high, n=effect.n) if effect else Value(None)


def chain_table(
    rows: Mapping[str, Cell], baselines: Sequence[str], published: Mapping[str, Mapping[str, Published]]
) -> CellTable:
    """Table II: steps of the chain in order; a dagger is a one-sided paired t test against the row before, p < 0.05.

    Daggers are as in the paper, not corrected for their number; the paired table beside it has Holm's correction.

    Args:
        baselines: rows that stand at the top for reference only: the row after them has nothing to improve on.
    """
    names = list(rows)
    lines: list[tuple[tuple[str, ...], Mapping[str, Value]]] = []
    pairs = []
    for i, (name, cell) in enumerate(rows.items()):
        values = values_of(cell, published.get(name))
        before = names[i - 1] if i and names[i - 1] not in baselines else None
        if before is not None:
            for metric in tested(rows.values()):
                test = against(cell, rows[before], metric, "greater")
                if test and test.p < ALPHA:
                    values[metric] = replace(values[metric], mark=DAGGER)
            pairs.append((name, before))
        lines.append(((str(i), name), values))
    compared, warnings = _pairs(rows, pairs)
    return CellTable(
        "chain",
        "Steps of the chain, one after the other (Table II of the paper)",
        ("row", "step"),
        ("fad", *tested(rows.values())),
        tuple(lines),
        (
            f"{DAGGER}: better than the row before, one-sided paired t test over prompts, p < {ALPHA:g}, not corrected "
            "for the number of tests (as in the paper). The table of pairs has two-sided tests and Holm's correction.",
            "FAD is one number per row: whether two intervals overlap says more than which is smaller.",
            *_estimate(rows.values()),
            *_failures(rows),
            *warnings,
        ),
        compared,
    )


def factorial_table(
    rows: Mapping[tuple[str, str, str], Cell],
    submitted: tuple[str, str, str],
    published: Mapping[tuple[str, str, str], Mapping[str, Published]],
) -> CellTable:
    """Table III: stage x weights x forward; an asterisk marks cells that are tied with the first submission.

    Args:
        rows: (stage, weights, forward) -> cell.
        submitted: the row that the others are held against.
    """
    lines: list[tuple[tuple[str, ...], Mapping[str, Value]]] = []
    for key, cell in rows.items():
        values = values_of(cell, published.get(key))
        for metric in tested(rows.values()) if key != submitted else ():
            test = against(cell, rows[submitted], metric)
            if test and test.p >= ALPHA:
                values[metric] = replace(values[metric], mark=TIE)
        lines.append((key, values))
    named = {" ".join(part for part in key if part): cell for key, cell in rows.items()}
    first = " ".join(part for part in submitted if part)
    compared, warnings = _pairs(named, [(name, first) for name in named if name != first])
    return CellTable(
        "factorial",
        "Weights of one mechanism in the forward of another (Table III of the paper)",
        ("stage", "weights", "forward"),
        ("fad", *tested(rows.values())),
        tuple(lines),
        (
            f"{TIE}: not told apart from {first} by a two-sided paired t test, p >= {ALPHA:g} (as in the paper). That "
            "is no evidence of equality: the intervals of the differences are in the table of pairs.",
            "The paper's text has one pair of figures for v2 weights in the v1 forward; both such rows show it. They "
            "are made by force (force_head): everywhere else such weights are refused.",
            *_estimate(rows.values()),
            *_failures(named),
            *warnings,
        ),
        compared,
    )


def contrast_table(
    name: str, rows: Mapping[str, Cell], published: Mapping[tuple[str, str], Mapping[str, Published]]
) -> CellTable:
    """Any systems side by side, each compared with the first."""
    first, *others = rows
    lines: list[tuple[tuple[str, ...], Mapping[str, Value]]] = [
        ((row,), values_of(cell, published.get((name, row)))) for row, cell in rows.items()
    ]
    compared, warnings = _pairs(rows, [(other, first) for other in others])
    return CellTable(
        name,
        f"{name.capitalize()}, each against {first}",
        ("system",),
        ("fad", *tested(rows.values())),
        tuple(lines),
        (*_estimate(rows.values()), *_failures(rows), *warnings),
        compared,
    )


def sweep_table(
    curves: Mapping[str, Mapping[float, Cell]],
    published: Mapping[tuple[str, float], Mapping[str, Published]],
    notes: tuple[str, ...] = (),
) -> CellTable:
    """The points of Figure 2."""
    everyone = [cell for cells in curves.values() for cell in cells.values()]
    lines: list[tuple[tuple[str, ...], Mapping[str, Value]]] = [
        ((name, f"{score:g}"), values_of(cell, published.get((name, score))))
        for name, cells in curves.items()
        for score, cell in cells.items()
    ]
    return CellTable(
        "sweep",
        "Input score against what comes out (Figure 2 of the paper)",
        ("checkpoint", "s"),
        ("fad", *tested(everyone)),
        tuple(lines),
        (
            *notes,
            *_estimate(everyone),
            *_failures({f"{name}, s = {s:g}": cell for name, cells in curves.items() for s, cell in cells.items()}),
        ),
    )


def against(a: Cell, b: Cell, metric: str, alternative: Alternative = "two-sided") -> Paired | None:
    """Paired test over the prompts that both have; None where there are fewer than two."""
    x, y = a.scores.get(metric, {}), b.scores.get(metric, {})
    common = [one for one in x if one in y]
    if len(common) < 2:
        return None
    return paired(np.array([x[one] for one in common]), np.array([y[one] for one in common]), alternative=alternative)


def _failures(cells: Mapping[str, Cell]) -> tuple[str, ...]:
    return tuple(
        f"{name}: {cell.failed} clips failed and are in no column." for name, cell in cells.items() if cell.failed
    )


def _pairs(
    cells: Mapping[str, Cell], pairs: Sequence[tuple[str, str]]
) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    """Two-sided comparisons with Holm's correction over all of them, and what a reader must know of their prompts."""
    scores = [
        ClipScore(name, prompt, metric, value)
        for name, cell in cells.items()
        for metric in (*TESTED, QUALITY)
        for prompt, value in cell.scores.get(metric, {}).items()
    ]
    compared, warnings = comparisons(scores, pairs=pairs)
    return tuple(compared), tuple(warnings)
