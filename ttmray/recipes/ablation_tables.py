"""The tables of the paper from evaluated cells: marks, best values, the paper's own figures beside ours.

Nothing here runs a model. A cell is one system (a checkpoint under one way of generating) with its evaluation; its
scores per prompt are means over the samples of the prompt.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from markupsafe import Markup

from ttmray import pages
from ttmray.errors import UserError
from ttmray.evaluation.compare import (
    COMPARED,
    ClipScore,
    comparisons,
    legend,
    paired_table,
    prompt_means,
    without_marks,
)
from ttmray.evaluation.results import Results
from ttmray.recipes.published import Published
from ttmray.statistics import Alternative, Paired, mean_interval, paired, pearson, pearson_interval

ALPHA = 0.05
DAGGER, TIE = "†", "∗"
TITLES = {"fad": "FAD-CLAP", "clap_score": "CLAP score", "reward": "Reward", "score_r": "Score-r", "delta_out": "Δout"}
LOWER_IS_BETTER = {"fad"}
TESTED = ("clap_score", "reward")
"""Metrics of single clips. FAD is one number per system and has an interval instead of a paired test."""


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
    """A number of a table with the end points of its 95 % interval, its mark, and what the paper has in its place."""

    value: float | None
    low: float | None = None
    high: float | None = None
    mark: str = ""
    paper: Published | None = None


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
        if row[metric] is not None
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


def values_of(cell: Cell, paper: Mapping[str, Published] | None = None) -> dict[str, Value]:
    """FAD, CLAP score and reward, with the intervals of their evaluations."""
    known = paper or {}
    value, low, high = cell.fad
    by_metric = {"fad": Value(value, low, high, paper=known.get("fad"))}
    for metric in TESTED:
        values = np.array(list(cell.scores.get(metric, {}).values()))
        ends = cell.ends.get(metric) or mean_interval(values) or (None, None)
        by_metric[metric] = Value(cell.mean(metric), *ends, paper=known.get(metric))
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
        lines.append(((name,), values_of(cell) | dict.fromkeys(("score_r", "delta_out"), Value(None))))
    for name, cells in rows.items():
        inputs = np.concatenate([np.full(len(cell.clips["reward"]), score) for score, cell in cells.items()])
        outputs = np.concatenate([cell.clips["reward"] for cell in cells.values()])
        prompts = [prompt for cell in cells.values() for prompt in cell.prompts_of("reward")]
        r, (low, high) = pearson(inputs, outputs), pearson_interval(inputs, outputs, prompts) or (None, None)
        effect = against(cells[steer[1]], cells[steer[0]], "reward")
        moved = Value(effect.difference, effect.low, effect.high) if effect else Value(None)
        lines.append(((name,), values_of(cells[at]) | {"score_r": Value(r, low, high), "delta_out": moved}))
    return CellTable(
        "heads",
        "Score-conditioning heads (Table I of the paper)",
        ("head",),
        ("fad", "clap_score", "score_r", "delta_out"),
        tuple(lines),
        (
            f"FAD-CLAP and CLAP score are of the clips at s = {at:g}; which input scores the paper's columns are of is "
            "not public, nor is its grid.",
            f"Score-r: Pearson's r of input score and reward over all clips at "
            f"s = {', '.join(f'{score:g}' for score in next(iter(rows.values()), {}))}, its interval over prompts. "
            f"Δout: mean reward at s = {steer[1]:+g} minus that at {steer[0]:+g}.",
            "The paper's text gives only that score-conditioned heads lie 0.025 to 0.040 below the unconditional FAD.",
            *_failures(unconditional),
            *_failures({f"{name}, s = {s:g}": cell for name, cells in rows.items() for s, cell in cells.items()}),
        ),
    )


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
            for metric in TESTED:
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
        ("fad", *TESTED),
        tuple(lines),
        (
            f"{DAGGER}: better than the row before, one-sided paired t test over prompts, p < {ALPHA:g}, not corrected "
            "for the number of tests (as in the paper). The table of pairs has two-sided tests and Holm's correction.",
            "FAD is one number per row: whether two intervals overlap says more than which is smaller.",
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
        for metric in TESTED if key != submitted else ():
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
        ("fad", *TESTED),
        tuple(lines),
        (
            f"{TIE}: not told apart from {first} by a two-sided paired t test, p >= {ALPHA:g} (as in the paper). That "
            "is no evidence of equality: the intervals of the differences are in the table of pairs.",
            "The paper's text has one pair of figures for v2 weights in the v1 forward; both such rows show it. They "
            "are made by force (force_head): everywhere else such weights are refused.",
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
        ("fad", *TESTED),
        tuple(lines),
        (*_failures(rows), *warnings),
        compared,
    )


def sweep_table(
    curves: Mapping[str, Mapping[float, Cell]],
    published: Mapping[tuple[str, float], Mapping[str, Published]],
    notes: tuple[str, ...] = (),
) -> CellTable:
    """The points of Figure 2."""
    lines: list[tuple[tuple[str, ...], Mapping[str, Value]]] = [
        ((name, f"{score:g}"), values_of(cell, published.get((name, score))))
        for name, cells in curves.items()
        for score, cell in cells.items()
    ]
    return CellTable(
        "sweep",
        "Input score against what comes out (Figure 2 of the paper)",
        ("checkpoint", "s"),
        ("fad", *TESTED),
        tuple(lines),
        (
            *notes,
            *_failures({f"{name}, s = {s:g}": cell for name, cells in curves.items() for s, cell in cells.items()}),
        ),
    )


def render_table(table: CellTable, format: Literal["markdown", "latex", "csv", "html"]) -> str:
    """A table as text that ends in a newline: with caption and notes, but as CSV, which has one number per field.

    The best value of a column is bold. The paper's figures have columns of their own, where any is known; `≈` marks
    those that follow from differences in its text.
    """
    if format == "csv":
        return _csv(table)
    header, rows = _cells(table, format)
    if format == "latex":
        lines = [" & ".join(row) + r" \\" for row in (header, *rows)]
        columns = "l" * len(table.labels) + "r" * (len(header) - len(table.labels))
        body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:]]
        why = [f"% {table.meaningless}", rf"\textit{{{_latex(table.meaningless)}}}\par"] if table.meaningless else []
        text = [
            f"% {table.caption}",
            *why,
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *(f"% {note}" for note in _notes(table)),
        ]
        return "\n".join(text) + "\n"
    return pages.render(
        f"ablation_table.{'html' if format == 'html' else 'md'}.j2",
        caption=table.caption,
        meaningless=table.meaningless,
        header=header,
        rows=rows,
        notes=_notes(table),
        pairs=paired_table(table.pairs) if table.pairs else None,
        legend=legend(ALPHA, marked=not table.meaningless),
    )


def page(tables: Sequence[CellTable], figures: Sequence[str], protocols: Sequence[str], note: str) -> str:
    """All tables on one page of HTML; the SVGs of the sweep, for a light and a dark page, go below its table."""
    drawings = [Markup(svg[svg.index("<svg") :]) for svg in figures]
    return pages.render(
        "ablations.html.j2",
        title="Ablations",
        tables=[(table.name, Markup(render_table(table, "html"))) for table in tables],
        figures=list(zip(("light", "dark"), drawings, strict=bool(drawings))),
        protocols=protocols,
        note=note,
    )


def _cells(table: CellTable, format: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table; templates escape them, for LaTeX they are escaped here."""
    known = _known(table)
    header = [*table.labels, *(TITLES[metric] for metric in table.metrics)]
    header += [f"paper: {TITLES[metric]}" for metric in known]
    escape = _latex if format == "latex" else str
    rows = []
    for texts, values in table.rows:
        best = set() if table.meaningless else _best(table, values)
        cells = [escape(text) for text in texts]
        cells += [_shown(values[metric], metric in best, format) for metric in table.metrics]
        cells += [_published(values[metric].paper, format) for metric in known]
        rows.append(cells)
    return [escape(name) for name in header], rows


def _csv(table: CellTable) -> str:
    known = _known(table)
    names = list(table.labels)
    for metric in table.metrics:
        names += [metric, f"{metric}_low", f"{metric}_high", f"{metric}_mark"]
        names += [f"{metric}_paper"] if metric in known else []
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *(["note"] if table.meaningless else [])])
    for texts, values in table.rows:
        row: list[Any] = list(texts)
        for metric in table.metrics:
            value = values[metric]
            row += [value.value, value.low, value.high, value.mark]
            row += [value.paper.value if value.paper else None] if metric in known else []
        writer.writerow([*row, *([table.meaningless] if table.meaningless else [])])
    return text.getvalue()


def _shown(value: Value, best: bool, format: str) -> str:
    if value.value is None:
        return "–" if format != "latex" else "--"
    number = _number(value.value)
    mark = {"latex": {DAGGER: r"$^{\dagger}$", TIE: r"$^{*}$"}}.get(format, {}).get(value.mark, value.mark)
    if best:
        number = {"latex": rf"\textbf{{{number}}}", "html": Markup("<b>{}</b>").format(number)}.get(
            format, f"**{number}**"
        )
    interval = "" if value.low is None or value.high is None else f" [{_number(value.low)}, {_number(value.high)}]"
    return number + mark + interval


def _notes(table: CellTable) -> list[str]:
    notes = list(table.notes)
    if _known(table):
        notes.append(
            "paper: figures from the text of arXiv 2606.21670, ≈ where they follow from differences in it. They can be "
            "compared with ours only for equal prompts, reference set, weights of the encoders and N."
        )
    return notes


def _known(table: CellTable) -> list[str]:
    """Metrics of which the paper has a figure in some row."""
    return [metric for metric in table.metrics if any(values[metric].paper for _, values in table.rows)]


def _number(value: float) -> str:
    return f"{round(value, 4) + 0.0:.4f}"  # no -0.0000


def _published(value: Published | None, format: str) -> str:
    if value is None:
        return ""
    return (r"$\approx$" if format == "latex" else "≈") * value.about + value.text


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "Δ": r"$\Delta$"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def _best(table: CellTable, values: Mapping[str, Value]) -> set[str]:
    best = set()
    for metric in table.metrics:
        column = [row[metric].value for _, row in table.rows]
        numbers = [value for value in column if value is not None]
        mine = values[metric].value
        if mine is not None and len(numbers) > 1:
            top = min(numbers) if metric in LOWER_IS_BETTER else max(numbers)
            best |= {metric} if mine == top else set()
    return best


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
        for metric in TESTED
        for prompt, value in cell.scores.get(metric, {}).items()
    ]
    compared, warnings = comparisons(scores, pairs=pairs)
    return tuple(compared), tuple(warnings)
