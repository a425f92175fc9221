"""Tables of cells as text: Markdown, LaTeX, CSV and HTML, and the page with all of them."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from markupsafe import Markup

from ttmray import pages
from ttmray.evaluation.compare import legend, paired_table
from ttmray.recipes.ablation_tables import ALPHA, DAGGER, LOWER_IS_BETTER, TIE, TITLES, CellTable, Value
from ttmray.recipes.published import Published


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
