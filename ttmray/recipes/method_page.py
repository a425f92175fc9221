"""The comparison of tuning methods for people and for programs: a sentence, a part of a page, Markdown, and tables of
commas."""

import csv
import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from ttmray import pages

REWARD, QUALITY = "reward", "quality"
"""The reward that all methods are trained on, and the quality that is heard."""
OUT, JSON = "comparison", "comparison/methods.json"
FIGURE = "comparison/hacking-{theme}.svg"
LABELS = {REWARD: "Trained reward", QUALITY: "True quality", "clap_score": "CLAP score", "reward_score": "Reward"}
SETS = {"fad": ("FAD ↓", 3), "kad": ("KAD ↓", 3), "vendi": ("Vendi ↑", 2)}
"""Metrics of sets of clips, with label and digits."""


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


def headline(result: Mapping[str, Any]) -> str:
    """What came out, in three sentences: the method with the highest reward, what became of the true quality, and
    which methods raise both. Nothing is named best where the numbers mean nothing."""
    if result["meaningless"]:
        return "By untrained models: these numbers mean nothing, and no method is named as better."
    rows = [row for row in result["rows"] if REWARD in row["changes"]]
    if not rows:
        return "No method can be compared with the parent: fewer than two held-out prompts have clips of both."
    best = max(rows, key=lambda row: row["changes"][REWARD]["value"])
    reward, quality = best["changes"][REWARD], best["changes"].get(QUALITY)
    seeds = f"{len(result['seeds'])} seed{'s' if len(result['seeds']) > 1 else ''}"
    text = f"{best['name']} has the highest trained reward: {_signed(reward['value'])} against the parent "
    text += f"({share(result)} interval {_signed(reward['low'])} to {_signed(reward['high'])}, "
    text += f"{reward['n']} held-out prompts, {seeds}), {_in_words(reward, result)}."
    if quality is not None:
        ends = f"{_signed(quality['low'])} to {_signed(quality['high'])}"
        text += f" Its true quality changes by {_signed(quality['value'])} ({ends}), {_in_words(quality, result)}."
    both = [row["name"] for row in rows if row["verdict"] == "both rise"]
    hacked = [row["name"] for row in rows if row["verdict"].startswith("hacked")]
    text += f" Both rise by {', '.join(both)}." if both else f" No method of {len(rows)} is told to raise both."
    return text + (f" Hacked, reward up and quality down: {', '.join(hacked)}." if hacked else "")


def share(result: Mapping[str, Any]) -> str:
    """Confidence of the intervals in words; comparisons of older versions do not say it, and have 95 %."""
    return f"{100 * result.get('confidence', 0.95):g} %"


def side(change: Mapping[str, Any], result: Mapping[str, Any]) -> int:
    """1: told to be above the parent, -1: below, 0: neither; corrected for the number of methods as verdicts are."""
    told = change["p"] is not None and change["p"] * _methods(result) < 1 - result.get("confidence", 0.95)
    return 0 if not told else 1 if change["value"] > 0 else -1


def _methods(result: Mapping[str, Any]) -> int:
    return sum(bool(row["changes"]) for row in result["rows"])


def _in_words(change: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Intervals are those of one change; words are of the best of several methods."""
    if side(change, result):
        return "told from chance"
    without_zero = change["low"] > 0 or change["high"] < 0
    return "which may be chance" + (f" among {_methods(result)} methods" if without_zero else "")


def section(result: Mapping[str, Any], svgs: Mapping[str, Markup]) -> Markup:
    """The comparison as a part of a page: changes with intervals and what is told of them, the figure, costs, pairs.

    Args:
        svgs: theme -> the figure.
    """
    measures: list[str] = result["measures"]
    sets = [name for name in SETS if name in result["rows"][0]["sets"]]
    header = ["Method", "Verdict", *(LABELS.get(name, name.replace("_", " ").capitalize()) for name in measures)]
    header += [*(SETS[name][0] for name in sets), "Distance", "Failed"]
    rows = []
    for row in result["rows"]:
        cells: list[Any] = [row["name"], row["verdict"]]
        for name in measures:
            change = row["changes"].get(name)
            cells.append(_changed(change, result) if row["account"] else (_number(row["means"][name]), "mean"))
        cells += [(pages.number(row["sets"].get(name, {}).get("mean"), SETS[name][1]), "") for name in sets]
        rows.append([*cells, (_number(row["distance"]), ""), (str(row["failed"]), "")])
    tables = _tables(result)
    return Markup(
        pages.render(
            "methods_table.html.j2",
            header=header,
            rows=rows,
            share=share(result),
            svgs=list(svgs.items()),
            files=[
                f"{OUT}/{name}" for name in ("methods.md", "methods.csv", "clips.csv", "curves.csv", "contrasts.csv")
            ],
            **{name: tables[name] for name in ("cost_header", "costs", "pairs", "reward")},
            **{name: result[name] for name in ("equal", "meaningless", "seeds", "prompts")},
        )
    )


def _changed(change: Mapping[str, Any] | None, result: Mapping[str, Any]) -> tuple[str, str, str]:
    if change is None:
        return ("–", "", "")
    said = ("not told", "▲ higher", "▼ lower")[side(change, result)]
    ends = f"{_signed(change['low'])} to {_signed(change['high'])}"
    return (_signed(change["value"]), ends, "" if result["meaningless"] else said)


_number = partial(pages.number, digits=3)
_signed = partial(pages.number, digits=3, sign="+")


def _shown(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "–"
    return f"{_signed(one['value'])} ({_signed(one['low'])} to {_signed(one['high'])})"


def _tables(result: Mapping[str, Any]) -> dict[str, Any]:
    """What page and Markdown share: costs, pairs, and of what the reward is the sum."""
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
        (one["measure"], one["a"], one["b"], _shown(one), pages.p_value(one["p"]), pages.p_value(one["p_holm"]))
        for one in result["contrasts"]
    ]
    summed = (name if weight == 1 else f"{weight:g} {name}" for name, weight in result["rewards"].items())
    return {
        "reward": " + ".join(summed),
        "cost_header": (
            "", "clips", "updates", "passes", "TFLOP training", "TFLOP sampling", "CPU s", "GPU s", "wall s",
            "weights moved",
        ),
        "costs": costs,
        "pairs": pairs,
    }  # fmt: skip


def markdown(result: Mapping[str, Any]) -> str:
    """The tables for people."""
    measures: list[str] = result["measures"]
    sets = [name for name in SETS if name in result["rows"][0]["sets"]]
    main = [
        (
            row["name"],
            *(
                _number(row["means"][name]) if not row["account"] else _shown(row["changes"].get(name))
                for name in measures
            ),
            *(_number(row["sets"].get(name, {}).get("mean")) for name in sets),
            _number(row["distance"]),
            str(row["failed"]),
            row["verdict"],
        )
        for row in result["rows"]
    ]
    return pages.render(
        "methods.md.j2",
        **{name: result[name] for name in ("equal", "note", "meaningless", "seeds", "prompts")},
        **_tables(result),
        headline=headline(result),
        header=("", *measures, *sets, "distance", "failed", "reward and true quality"),
        main=main,
    )
