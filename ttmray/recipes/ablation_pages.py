"""Tables of cells as text: Markdown, LaTeX, CSV and HTML, the page with all of them, and a sentence of each."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from markupsafe import Markup
from pydantic import TypeAdapter

from ttmray import pages
from ttmray.evaluation.compare import legend, paired_table
from ttmray.recipes.ablation_tables import ALPHA, DAGGER, LOWER_IS_BETTER, TIE, TITLES, CellTable, Value
from ttmray.recipes.published import Published

STORED = "tables/results.json"
"""All tables of a run as they are, for its pages."""
_STORED = TypeAdapter(tuple[CellTable, ...])
TOLD = 3
"""Pairs that a sentence names."""


def render_table(table: CellTable, format: Literal["markdown", "latex", "csv", "html"]) -> str:
    """A table as text that ends in a newline: with caption and notes, but as CSV, which has one number per field.

    The best value of a column is bold. The paper's figures have columns of their own, where any is known; `≈` marks
    those that follow from differences in its text.
    """
    if format == "csv":
        return _csv(table)
    if format == "html":
        return section(table)
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
    return pages.render("ablation_table.md.j2", header=header, rows=rows, **_about(table))


def _about(table: CellTable) -> dict[str, Any]:
    return {
        "caption": table.caption,
        "meaningless": table.meaningless,
        "notes": _notes(table),
        "pairs": paired_table(table.pairs) if table.pairs else None,
        "legend": legend(ALPHA, marked=not table.meaningless),
    }


def section(table: CellTable, figures: Sequence[str] = (), *, said: bool = True) -> Markup:
    """A table as HTML, with its notes and pairs.

    Args:
        figures: SVGs of the sweep, for a light and a dark page.
        said: its sentence stands above it.
    """
    svgs = [(theme, inline(svg)) for theme, svg in zip(("light", "dark"), figures, strict=bool(figures))]
    header, rows = _shown_cells(table)
    return Markup(
        pages.render(
            "ablation_table.html.j2",
            header=header,
            rows=rows,
            heads=len(table.labels),
            said=sentence(table) if said else "",
            svgs=svgs,
            **_about(table),
        )
    )


def inline(svg: str) -> Markup:
    """An SVG file as a part of a page."""
    return Markup(svg[svg.index("<svg") :])


def page(tables: Sequence[CellTable], figures: Sequence[str], protocols: Sequence[str], note: str) -> str:
    """All tables on one page of HTML.

    Args:
        figures: SVGs of the sweep, for a light and a dark page.
    """
    return pages.render(
        "ablations.html.j2",
        title="Ablations",
        tables=[section(table, figures if table.name == "sweep" else ()) for table in tables],
        protocols=protocols,
        note=note,
    )


def stored(tables: Sequence[CellTable]) -> bytes:
    """Tables as JSON, which `read_stored` reads."""
    return _STORED.dump_json(tuple(tables), indent=1)


def read_stored(data: bytes) -> tuple[CellTable, ...]:
    """The tables of `tables/results.json`, the one that the page of a run begins with first: the chain, else as they
    come.

    Raises:
        ValueError: it is something else.
    """
    return tuple(sorted(_STORED.validate_json(data), key=lambda table: table.name != "chain"))


def sentence(table: CellTable) -> str:
    """What a table says: the row with the highest mean reward, and which pairs are told from chance; of heads the one
    that follows the input score most. Nothing is named best where the numbers mean nothing."""
    if table.meaningless:
        return f"{table.meaningless} No row is named as better."
    metric, what = ("score_r", "Score-r") if "score_r" in table.metrics else ("reward", "mean reward")
    known = {row_name(table, texts): values[metric] for texts, values in table.rows}
    known = {name: one for name, one in known.items() if one.value is not None}
    if not known:
        return f"No row has a {what}."
    best = max(known, key=lambda name: known[name].value or 0.0)
    one = known[best]
    ends = "" if one.low is None or one.high is None else f"95 % interval {_signed(one.low)} to {_signed(one.high)}, "
    text = f"{best} has the highest {what}, {_signed(one.value)} ({ends}{one.n} prompts)"
    pairs = [pair for pair in table.pairs if pair["metric"] == metric]
    if not pairs:
        return f"{text}; no row is tested against another."
    told = [pair for pair in pairs if pair["significant"]]
    parts = [
        f"{pair['a']} {abs(pair['difference']):.3f} {'above' if pair['difference'] > 0 else 'below'} {pair['b']} "
        f"(Holm's p {pages.p_value(pair['p_holm'])})"
        for pair in told[:TOLD]
    ]
    parts += [f"{len(told) - TOLD} more"] if len(told) > TOLD else []
    which = f"Told from chance: {'; '.join(parts)}." if told else ""
    left = len(pairs) - len(told)
    rest = f"{'The other ' if told else ''}{left} of {len(pairs)} pairs cannot be told apart." if left else ""
    rest = "The two cannot be told apart." if left == len(pairs) == 1 else rest
    return " ".join(part for part in (f"{text}.", which, rest) if part)


def row_name(table: CellTable, texts: Sequence[str]) -> str:
    """How sentences, pairs and `cells.json` call a row."""
    if table.name == "chain":
        return texts[1]
    if table.name == "sweep":
        return f"{texts[0]} at s = {texts[1]}"
    return " ".join(text for text in texts if text)


def _shown_cells(table: CellTable) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of a table on a page: texts, and (value, interval, what is to be said). After the reward stands
    by how much it differs from the row that the table pairs it with, where it pairs any."""
    known = _known(table)
    rewards = {pair["a"]: pair for pair in table.pairs if pair["metric"] == "reward" and not table.meaningless}
    header = list(table.labels)
    for metric in table.metrics:
        better = {"fad": " ↓"}.get(metric, "")
        header += [TITLES[metric] + better, *(["Reward, change"] if metric == "reward" and rewards else [])]
    header += [f"paper: {TITLES[metric]}" for metric in known]
    rows: list[list[Any]] = []
    for texts, values in table.rows:
        best = set() if table.meaningless else _best(table, values)
        row: list[Any] = list(texts)
        for metric in table.metrics:
            value = values[metric]
            text = pages.number(value.value, 4)
            shown = Markup("<b>{}</b>").format(text) if metric in best else text
            row.append((shown + (value.mark if value.value is not None else ""), _ends(value.low, value.high)))
            if metric == "reward" and rewards:
                row.append(_change(rewards.get(row_name(table, texts))))
        row += [(_published(values[metric].paper, "html"), "") for metric in known]
        rows.append(row)
    return header, rows


def _change(pair: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if pair is None:
        return ("–", "", "")
    side = "▲ above" if pair["difference"] > 0 else "▼ below"
    said = f"{side} {pair['b']}" if pair["significant"] else f"not told from {pair['b']}"
    return (pages.number(pair["difference"], 4, "+"), _ends(pair["low"], pair["high"], "+"), said)


def _ends(low: float | None, high: float | None, sign: str = "") -> str:
    if low is None or high is None:
        return ""
    return f"{pages.number(low, 4, sign)} to {pages.number(high, 4, sign)}"


def _signed(value: float | None) -> str:
    return pages.number(value, 3, "+")


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
        number = rf"\textbf{{{number}}}" if format == "latex" else f"**{number}**"
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
