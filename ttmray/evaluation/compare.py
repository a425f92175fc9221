"""Paired comparisons of systems from scores per prompt: the table of `ttmray evaluate` and `ttmray compare`.

Every cell pairs the means of both systems over their samples of a prompt. Holm's correction covers all cells of the
table. No models are needed: scores come from an evaluation, a manifest of a generation run, or any table of them.
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from rich import box
from rich.table import Table

from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.evaluation.results import CLIPS, RESULTS
from ttmray.generation import manifest
from ttmray.json_text import read_json
from ttmray.models.bundle import means_nothing
from ttmray.statistics import bootstrap, holm, mcnemar, paired, prompts_needed
from ttmray.storage import Folder, absolute, is_remote, parquet_table, split_path
from ttmray.tables import read_rows

COMPARED = {
    "clap_score": ("clap_score",),
    "reward": ("reward", "reward_score", "tunejury_reward"),
    "ccs": ("ccs",),
    "estimated_quality": ("estimated_quality",),
}
"""Metrics of single clips by which systems are compared (more is better), and their columns in tables of others."""
KNOWN = frozenset({"prompt_id", "id", "system"}.union(*COMPARED.values()))
Format = Literal["table", "markdown", "latex", "csv"]
ALPHA = 0.05
TERMINAL = {
    "metric": "metric",
    "n": "n",
    "mean A": "mean A",
    "mean B": "mean B",
    "A - B": "A - B",
    "95 % CI": "95 % CI",
    "p Holm": "p Holm",
    "d_z": "d_z",
    "wins/ties/losses": "W/T/L",
    "n needed": "n\nneeded",
}
"""Columns of `paired_table` that 100 columns of a terminal hold, and their headings there."""


@dataclass(frozen=True)
class ClipScore:
    """A metric of one clip."""

    system: str
    prompt_id: str
    metric: str
    value: float


def prompt_means(scores: Iterable[ClipScore]) -> dict[tuple[str, str], dict[str, float]]:
    """(metric, system) -> prompt id -> mean over the samples."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for score in scores:
        values.setdefault((score.metric, score.system), {}).setdefault(score.prompt_id, []).append(score.value)
    return {key: {one: float(np.mean(some)) for one, some in table.items()} for key, table in values.items()}


def comparisons(
    scores: Iterable[ClipScore],
    baseline: str | None = None,
    alpha: float = ALPHA,
    seed: int = 0,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The paired table, and warnings about prompts that only one side has.

    Args:
        scores: of all systems; systems keep their order.
        baseline: compare every other system with this one, as b; None compares all pairs.
        alpha: `significant` says that Holm's p is below it.
        seed: of the bootstrap.
        pairs: compare just these systems, (a, b), and not every one with the baseline or with every other.

    Returns:
        One dict per cell: a, b, metric, n (common prompts), mean_a, mean_b, difference (a - b), low and high (95 % t
        interval), t, p (paired t test), p_holm, p_wilcoxon, d_z, wins, ties, losses, p_mcnemar (exact, of wins against
        losses), boot_low and boot_high (95 % bootstrap over prompts, which carries the scatter of samples), n_needed
        (prompts that find this difference with a chance of 80 %), significant. Numbers that do not exist are None.

    Raises:
        UserError: no such baseline, or scores that are not finite.
    """
    means = prompt_means(scores)
    systems = list(dict.fromkeys(system for _, system in means))
    if baseline is not None and baseline not in systems:
        raise UserError(f"baseline: there is no system {baseline!r}.", f"Systems: {', '.join(systems)}.")
    if pairs is None:
        everyone = list(combinations(systems, 2))
        pairs = everyone if baseline is None else [(system, baseline) for system in systems if system != baseline]
    cells, warnings = [], []
    for metric in COMPARED:
        for a, b in pairs:
            if (metric, a) in means and (metric, b) in means:
                cell, warning = _cell(metric, a, b, means[metric, a], means[metric, b], seed)
                cells += [cell] if cell else []
                warnings += [warning] if warning else []
    corrected = holm({i: cell["p"] for i, cell in enumerate(cells)})
    for i, cell in enumerate(cells):
        cell |= {"p_holm": corrected[i], "significant": corrected[i] < alpha}
    return [plain(cell) for cell in cells], warnings


def compare(
    sources: Sequence[str],
    *,
    format: Format = "table",
    out: str | None = None,
    baseline: str | None = None,
    alpha: float = ALPHA,
) -> int:
    """Print (or write to `out`) the paired table of evaluations, generation runs with scores, or tables of scores.

    Raises:
        UserError: sources without scores, scores under several protocols, or fewer than two systems.
    """
    scores: list[ClipScore] = []
    protocols: dict[str, dict[str, str]] = {}
    """Metric -> protocol -> the first source that has it."""
    for source in sources:
        of_source, made_by = read_scores(source)
        names = {score.system for score in of_source}
        if names & {score.system for score in scores}:
            end = absolute(source).rpartition("/")[2]
            of_source = [ClipScore(f"{end}/{s.system}", s.prompt_id, s.metric, s.value) for s in of_source]
        scores += of_source
        for metric in dict.fromkeys(score.metric for score in of_source):
            protocols.setdefault(metric, {}).setdefault(made_by.get(metric, ""), source)
    for metric, known in protocols.items():
        if len(known) > 1:
            lines = [f"{source}: {protocol or 'unknown'}" for protocol, source in known.items()]
            raise UserError(
                f"the scores of {metric} were made under several protocols:\n    " + "\n    ".join(lines),
                "Evaluate again.",
            )
    cells, warnings = comparisons(scores, baseline, alpha)
    if not cells:
        systems = sorted({score.system for score in scores})
        raise UserError(
            f"nothing to compare: systems {', '.join(systems)}. {' '.join(warnings)}",
            "Two systems with scores of the same two or more prompts are needed.",
        )
    marked = not any(means_nothing(protocol) for known in protocols.values() for protocol in known)
    cells = cells if marked else without_marks(cells)
    header, rows = paired_table(cells)
    if not marked:
        header[-1], rows = "note", [[*row[:-1], MEANINGLESS] for row in rows]
    written = render(header, rows, "markdown" if format == "table" else format)
    if out is not None:
        folder, name = split_path(out)
        folder.write(name, written.encode())
        console.print(f"{len(cells)} comparisons in {out}", markup=False)
    elif format == "table":
        show_pairs(cells)
    else:
        console.print(written, markup=False, end="")
    if out is not None or format == "table":
        scorers = dict.fromkeys(protocol or "an unknown protocol" for known in protocols.values() for protocol in known)
        console.print(f"scores by {', '.join(scorers)}; {legend(alpha, marked=marked)}", markup=False)
        for warning in warnings:
            console.print(warning, style="yellow")
    return EXIT_OK


def read_scores(source: str) -> tuple[list[ClipScore], dict[str, str]]:
    """Scores of the ok clips of one source, and metric -> protocol where the source says it.

    Args:
        source: folder of an evaluation or of a generation run, the `results.json` or `clips.parquet` of an evaluation,
            or a table (.csv, .tsv, .json, .jsonl, .parquet) with the columns prompt_id (or id), one or more metrics
            (`COMPARED`), and system (default: the file's name).

    Raises:
        UserError: none of that, or values that are no finite numbers.
    """
    parent, file = split_path(source)
    folder = parent if file in (RESULTS, CLIPS) and parent.exists(RESULTS) else Folder.at(source)
    if folder.exists(RESULTS):
        try:
            rows = parquet_table(folder.read(CLIPS)).to_pylist()
            results = read_json(folder.read(RESULTS))
            protocols = dict.fromkeys(COMPARED, str(results["protocol"]))
            for own in ("ccs", "estimated_quality"):  # made by something else than the bundle
                named = [one["metrics"][own]["protocol"] for one in results["systems"] if own in one["metrics"]]
                protocols |= {own: str(named[0]) if named else ""}
            numbered = [(f"{folder.path(CLIPS)}, row {i}", row) for i, row in enumerate(rows, 1)]
            places = [(place, row) for place, row in numbered if row["status"] == "ok"]
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} holds no evaluation: {error}", "Run `ttmray evaluate` again.") from error
    elif folder.exists("run.json"):
        generated = [row for row in manifest.read_rows(folder).values() if row["status"] == manifest.OK]
        name = folder.name
        places = [(f"{folder}: {row['name']}", row | {"system": name}) for row in generated]
        known = {row["protocol"] or "" for row in generated}
        protocols = dict.fromkeys(COMPARED, known.pop() if len(known) == 1 else "")
    elif not is_remote(source) and not os.path.exists(absolute(source)):
        raise UserError(f"{source}: not found.", "Check the path.")
    else:
        places, protocols = read_rows(absolute(source), KNOWN), {}
    default = split_path(source)[1].rpartition(".")[0] or source
    scores = [score for place, row in places for score in _row_scores(row, place, default)]
    if not scores:
        columns = ", ".join(name for names in COMPARED.values() for name in names)
        raise UserError(f"{source} holds no scores of prompts.", f"Columns prompt_id, system and {columns} count.")
    return scores, protocols


def system_table(systems: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: a row per metric and system, so that any number of either fits a terminal's width."""
    rows = []
    for name in dict.fromkeys(name for system in systems for name in system["metrics"]):
        for system in systems:
            if (metric := system["metrics"].get(name)) is None:
                continue
            value = "" if metric["value"] is None else f"{metric['value']:.4f}"
            interval = "" if metric["low"] is None else f"[{metric['low']:.4g}, {metric['high']:.4g}]"
            n = f"{metric['n_generated']}" + (f" / {metric['n_reference']}" if metric["n_reference"] else "")
            rows.append([name, system["name"], value, interval, n])
    return ["metric", "system", "value", "95 % CI", "N (/ reference)"], rows


def paired_table(cells: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text; a star marks what is significant after Holm's correction."""
    header = ["metric", "A", "B", "n", "mean A", "mean B", "A - B", "95 % CI", "t", "p", "p Holm", "p Wilcoxon"]
    header += ["d_z", "wins/ties/losses", "n needed", ""]
    rows = []
    for cell in cells:
        means = [f"{cell[name]:+.4f}" for name in ("mean_a", "mean_b", "difference")]
        interval = f"[{cell['low']:+.4f}, {cell['high']:+.4f}]"
        p_values = [f"{cell[name]:.2g}" for name in ("p", "p_holm", "p_wilcoxon")]
        t, d_z = (
            f"{cell[name]:.2f}" if cell[name] is not None else f"{cell['difference']:+}"[0] + "inf"
            for name in ("t", "d_z")
        )
        wins = f"{cell['wins']}/{cell['ties']}/{cell['losses']}"
        needed = "" if cell["n_needed"] is None else str(cell["n_needed"])
        star = "*" if cell["significant"] else ""
        row = [cell["metric"], cell["a"], cell["b"], str(cell["n"]), *means, interval, t, *p_values]
        rows.append([*row, d_z, wins, needed, star])
    return header, rows


def legend(alpha: float = ALPHA, *, marked: bool = True) -> str:
    """What stands in the paired table.

    Args:
        marked: whether anything may be called significant, see `without_marks`.
    """
    star = f"* is p < {alpha:g} after Holm's correction over the table" if marked else MEANINGLESS
    return (
        f"paired t tests over prompts, 95 % t intervals of the difference; {star}; n needed: prompts with which four "
        "of five tests would find this difference"
    )


MEANINGLESS = "nothing is marked: these scores are of untrained models and mean nothing"


def without_marks(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cells of scores that mean nothing: none is called significant."""
    return [dict(cell) | {"significant": False} for cell in cells]


def render(header: Sequence[str], rows: Sequence[Sequence[str]], format: Literal["markdown", "latex", "csv"]) -> str:
    """A table as text that ends in a newline."""
    if format == "csv":
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        return text.getvalue()
    if format == "latex":
        lines = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in (header, *rows)]
        body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        return "\n".join([rf"\begin{{tabular}}{{{'l' * len(header)}}}", *body, r"\end{tabular}", ""])
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:], ""])


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, drawn by rich."""
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_pairs(cells: Sequence[Mapping[str, Any]]) -> None:
    """Print the paired table: for each pair of systems a row per metric, with the columns of `TERMINAL`."""
    for a, b in dict.fromkeys((cell["a"], cell["b"]) for cell in cells):
        header, rows = paired_table([cell for cell in cells if (cell["a"], cell["b"]) == (a, b)])
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for name, heading in TERMINAL.items():
            table.add_column(heading, justify="left" if name == "metric" else "right")
        for row in rows:
            line = dict(zip(header, row, strict=True))
            line["p Holm"] += line[""] or " "  # the star; a blank keeps the digits aligned
            table.add_row(*(line[name] for name in TERMINAL))
        console.print(f"A {a}, B {b}", markup=False)
        console.print(table)


def plain(value: Any) -> Any:
    """Plain JSON types; what is not finite is None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(
    metric: str, a: str, b: str, of_a: Mapping[str, float], of_b: Mapping[str, float], seed: int
) -> tuple[dict[str, Any] | None, str]:
    common = [one for one in of_a if one in of_b]
    only = len(of_a) + len(of_b) - 2 * len(common)
    warning = f"{metric}, {a} against {b}: {only} prompts have a score on one side only." if only else ""
    if len(common) < 2:
        return None, f"{metric}, {a} against {b}: {len(common)} common prompts say nothing about a difference."
    x, y = (np.array([table[one] for one in common]) for table in (of_a, of_b))
    result = paired(x, y)
    boot = bootstrap(x[:, None], y[:, None], seed=seed)
    wins, losses = result.wins or 0, result.losses or 0
    try:
        needed = prompts_needed(result.difference, result.sd)
    except UserError:  # no difference, or none that ten million prompts would find
        needed = None
    cell = {"a": a, "b": b, "metric": metric, "n": result.n, "mean_a": float(x.mean()), "mean_b": float(y.mean())}
    cell |= {name: getattr(result, name) for name in ("difference", "sd", "low", "high", "t", "p", "d_z")}
    cell |= {"p_wilcoxon": result.wilcoxon_p, "wins": wins, "ties": result.ties, "losses": losses}
    cell |= {"p_mcnemar": mcnemar(wins, losses, exact=True)[1], "n_needed": needed}
    return cell | {"boot_low": boot.low, "boot_high": boot.high}, warning


def _row_scores(row: Mapping[str, Any], place: str, default: str) -> list[ClipScore]:
    identifier = row.get("prompt_id", row.get("id"))
    if identifier is None or identifier == "":
        raise UserError(f"{place}: no prompt_id.", "Every row needs the id of its prompt.")
    system = str(row.get("system") or default)
    scores = []
    for metric, columns in COMPARED.items():
        cell = next((row[name] for name in columns if row.get(name) not in (None, "")), None)
        if cell is None:
            continue
        try:
            value = float(cell)
        except (TypeError, ValueError) as error:
            raise UserError(f"{place}: {metric} is {cell!r}, not a number.") from error
        if not math.isfinite(value):
            raise UserError(f"{place}: {metric} is {cell!r}.", "Leave the cell empty where there is no score.")
        scores.append(ClipScore(system, str(identifier), metric, value))
    return scores


def _latex(cell: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in cell)
