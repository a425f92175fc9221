"""The comparison of tuning methods for people and for programs: Markdown, and tables of commas."""

import csv
import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ttmray import pages


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of methods.csv."""
    flat: dict[str, Any] = {name: row[name] for name in ("name", "method", "verdict", "failed", "distance")}
    flat |= dict(row["means"])
    for name, one in row["changes"].items():
        flat |= {f"{name}_{part}": one[part] for part in ("value", "low", "high", "p", "p_holm", "n")}
    flat |= {name: one["mean"] for name, one in row["sets"].items()}
    return flat | dict(row["account"] or {})


def as_csv(rows: Sequence[Mapping[str, Any]], note: str = "") -> bytes:
    """A table with the columns of all rows, in the order in which they come up; nothing for no rows.

    Args:
        note: a column says it in every row, where there is something to say.
    """
    rows = [{**row, "note": note} for row in rows] if note else rows
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([dict(row) for row in rows])
    return text.getvalue().encode()


def markdown(result: Mapping[str, Any]) -> str:
    """The tables for people."""
    digits = partial(pages.number, digits=3)
    signed = partial(pages.number, digits=3, sign="+")

    def shown(one: Mapping[str, Any] | None) -> str:
        if one is None:
            return "–"
        return f"{signed(one['value'])} ({signed(one['low'])} to {signed(one['high'])})"

    measures: list[str] = result["measures"]
    sets = [name for name in ("fad", "kad", "vendi") if name in result["rows"][0]["sets"]]
    main = [
        (
            row["name"],
            *(
                digits(row["means"][name]) if not row["account"] else shown(row["changes"].get(name))
                for name in measures
            ),
            *(digits(row["sets"].get(name, {}).get("mean")) for name in sets),
            digits(row["distance"]),
            str(row["failed"]),
            row["verdict"],
        )
        for row in result["rows"]
    ]
    costs = [
        (
            row["name"],
            *(f"{row['account'][name]:,.0f}" for name in ("clips", "updates", "passes")),
            *(f"{row['account'][name]:,.3g}" for name in ("training_tflop", "sampling_tflop")),
            *(f"{row['account'][name]:,.0f}" for name in ("cpu_seconds", "gpu_seconds", "seconds")),
            f"{row['account']['weight_distance']:.2e}",
        )
        for row in result["rows"]
        if row["account"]
    ]
    pairs = [
        (one["measure"], one["a"], one["b"], shown(one), pages.p_value(one["p"]), pages.p_value(one["p_holm"]))
        for one in result["contrasts"]
    ]
    return pages.render(
        "methods.md.j2",
        **{name: result[name] for name in ("equal", "note", "meaningless", "seeds", "prompts")},
        reward=" + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in result["rewards"].items()),
        header=("", *measures, *sets, "distance", "failed", "reward and true quality"),
        main=main,
        cost_header=(
            "", "clips", "updates", "passes", "TFLOP training", "TFLOP sampling", "CPU s", "GPU s", "wall s",
            "weights moved",
        ),
        costs=costs,
        pairs=pairs,
    )  # fmt: skip
