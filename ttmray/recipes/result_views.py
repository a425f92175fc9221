"""What the page of a chain begins with where its result is no single evaluation: the comparison of tuning methods, the
tables of cells; and the players below. All of it is read from files that steps have written."""

import csv
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from ttmray.generation import manifest
from ttmray.json_text import read_json
from ttmray.recipes import ablation_pages, method_page
from ttmray.storage import Folder

PROMPTS_SHOWN, SYSTEMS_HEARD = 4, 12
"""Of a long list the page shows the first; the pages of the steps have all."""
CLIPS = f"{method_page.OUT}/clips.csv"
PAGE, NESTED = "index.html", "tables"
"""Page of a chain; folder of the cells of a chain that has tables as one of its steps."""
SWEEP = {"light": "figures/sweep.svg", "dark": "figures/sweep-dark.svg"}
Chosen = Mapping[str, Mapping[str, int]]
"""System -> prompt id -> the sample to play."""


class View(NamedTuple):
    """The result of a chain.

    Attributes:
        headline: what came out, in a sentence or three.
        sections: parts of the page, the first of them what the headline speaks of.
        prompts: see `players_of`.
        link: page with more, below the run folder.
    """

    headline: str
    sections: list[Markup]
    prompts: list[dict[str, Any]]
    link: str = ""


def view_of(root: Folder) -> View | None:
    """The result of the chain in a folder; None where no step has written one."""
    if root.exists(method_page.JSON):
        return _methods(root)
    if root.exists(ablation_pages.STORED):
        return _tables(root, root, whole=True)
    nested = root.sub(NESTED)
    return _tables(root, nested, whole=False) if nested.exists(ablation_pages.STORED) else None


def _methods(root: Folder) -> View:
    result: dict[str, Any] = read_json(root.read(method_page.JSON))
    places = {theme: method_page.FIGURE.format(theme=theme) for theme in SWEEP}
    drawn = {theme: _drawing(root, name) for theme, name in places.items() if root.exists(name)}
    folders: dict[str, Folder] = {}
    for row in (row["name"] for row in result["rows"]):
        heard = root.sub("heard/parent" if row == "parent" else f"heard/{row}-{result['seeds'][0]}")
        takes = {file.name.partition("/")[0] for file in heard.files(sizes=False) if file.name.startswith("clips-")}
        if takes:
            folders[row] = heard.sub(
                max(takes, key=lambda name: int(name.removeprefix("clips-")))
            )  # the whole training
    prompts = players_of(root, folders, _best_takes(root))
    return View(method_page.headline(result), [method_page.section(result, drawn)], prompts)


def _best_takes(root: Folder) -> dict[str, dict[str, int]]:
    """Of a row that chooses the best of several candidates, prompt by prompt, the one that it has chosen."""
    best: dict[str, dict[str, tuple[float, int]]] = {}
    if not root.exists(CLIPS):
        return {}
    rows = [row for row in csv.DictReader(io.StringIO(root.read(CLIPS).decode())) if row["reward"]]
    first = {row["row"]: row["seed"] for row in reversed(rows)}
    for row in rows:
        if row["seed"] == first[row["row"]]:
            take = (float(row["reward"]), -int(row["sample"]))
            of_row = best.setdefault(row["row"], {})
            of_row[row["prompt_id"]] = max(take, of_row.get(row["prompt_id"], take))
    return {name: {prompt: -sample for prompt, (_, sample) in some.items()} for name, some in best.items()}


def _tables(root: Folder, base: Folder, *, whole: bool) -> View:
    tables = ablation_pages.read_stored(base.read(ablation_pages.STORED))
    figures = [base.read(name).decode() for name in SWEEP.values() if base.exists(name)]
    shown = tables if whole else tables[:1]
    sections = [
        ablation_pages.section(table, figures if table.name == "sweep" else (), said=table is not tables[0])
        for table in shown
    ]
    cells: dict[str, Any] = read_json(base.read("cells.json"))[tables[0].name]
    folders: dict[str, Folder] = {}
    for row, cell in cells.items():
        scores = cell.items() if isinstance(cell, dict) else [("", cell)]
        folders |= {f"{row} at s = {s}" if s else row: base.sub(f"cells/{name}/clips") for s, name in scores}
    link = "" if whole else f"{NESTED}/{PAGE}"
    return View(ablation_pages.sentence(tables[0]), sections, players_of(root, folders), link)


def _drawing(root: Folder, name: str) -> Markup:
    return ablation_pages.inline(root.read(name).decode())


def players_of(root: Folder, folders: Mapping[str, Folder], chosen: Chosen | None = None) -> list[dict[str, Any]]:
    """The first prompts that have clips, each with a clip of every system.

    Args:
        folders: system -> generation run, below `root`; one that is not there has no clips here.
        chosen: of systems with several clips of a prompt, which is played; else the first.
    """
    there = [(name, run) for name, run in folders.items() if run.exists("run.json")][:SYSTEMS_HEARD]
    prompts: dict[str, dict[str, Any]] = {}
    for name, run in there:
        takes = (chosen or {}).get(name, {})
        for row in manifest.read_rows(run).values():
            if row["file"] and takes.get(row["prompt_id"], row["candidate"]) == row["candidate"]:
                prompt = prompts.setdefault(row["prompt_id"], {"text": row["prompt"], "clips": {}})
                address = run.path(row["file"]).removeprefix(f"{root.uri}/")
                prompt["clips"].setdefault(name, {"system": name, "file": address, "row": row})
    return [one | {"clips": list(one["clips"].values())} for _, one in sorted(prompts.items())][:PROMPTS_SHOWN]
